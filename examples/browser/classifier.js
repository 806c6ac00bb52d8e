// A classifier of texts, from a folder that `to_onnx` wrote.

import { Tensor, json, load, open } from "./runtime.js";
import { makeTokenizer } from "./tokenizer.js";

const FILES = [
  "preprocessor.json",
  "tokenizer.json",
  "labels.json",
  "model.onnx",
  "model.onnx.data",
];
const ARRAYS = { int32: Int32Array, int64: BigInt64Array };

export class Classifier {
  /** The classifier of an entry of `site.json`. */
  static async load(model, progress) {
    const files = await load(model, FILES, progress);
    const made = new Classifier();
    made.session = await open(files["model.onnx"], files["model.onnx.data"]);
    made.text = json(files["preprocessor.json"]).text;
    made.labels = json(files["labels.json"]);
    made.tokenizer = makeTokenizer(json(files["tokenizer.json"]));
    return made;
  }

  /** `[{label, share}, ...]`, the likeliest first. */
  async classify(text) {
    const outputs = await this.session.run(this.inputs(this.encode(text)));
    const { data } = outputs[this.session.outputNames[0]];
    const shares = softmax([...data]);
    return this.labels
      .map((label, at) => ({ label, share: shares[at] }))
      .sort((one, other) => other.share - one.share);
  }

  /** Ids as in training: the text is cut, not the tokens around it. */
  encode(text) {
    const { start_ids: start, end_ids: end, max_length, padding } = this.text;
    const { ids } = this.tokenizer.encode(text, { add_special_tokens: false });
    const room = (max_length ?? Infinity) - start.length - end.length;
    const found = [...start, ...ids.slice(0, room), ...end];
    if (padding.to !== "max_length") return found;
    const fill = Array(Math.max(0, max_length - found.length)).fill(padding.id);
    return padding.side === "left" ? [...fill, ...found] : [...found, ...fill];
  }

  inputs(ids) {
    const { padding, inputs } = this.text;
    const values = {
      ids,
      type_ids: ids.map(() => 0),
      "ids != padding_id": ids.map((id) => Number(id !== padding.id)),
    };
    const types = Object.fromEntries(
      this.session.inputMetadata.map(({ name, type }) => [name, type]),
    );
    return Object.fromEntries(
      Object.entries(inputs).map(([name, field]) => {
        const type = types[name];
        const convert = type === "int64" ? BigInt : Number;
        const data = ARRAYS[type].from(values[field], convert);
        return [name, new Tensor(type, data, [1, ids.length])];
      }),
    );
  }
}

function softmax(logits) {
  const top = Math.max(...logits);
  const powers = logits.map((x) => Math.exp(x - top));
  const total = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / total);
}
