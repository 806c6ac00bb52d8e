// A language model that answers token by token, with its keys and values kept.

import { Template } from "./libraries/jinja.js";
import { Tensor, integers, json, load, open } from "./runtime.js";
import { Decoder, makeTokenizer } from "./tokenizer.js";

const FILES = [
  "genai_config.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "chat_template.jinja",
  "model.onnx",
  "model.onnx.data",
];
const CACHE = /^past_key_values\./;
// Tokens of a prompt that are read at once: short pieces, so that the page hears
// a request to stop between them. The first token of all is read alone: it has
// numbers a thousand times those of others, and all that are read at once are
// rounded to the same grid.
const PIECE = 16;

export class LanguageModel {
  /** The model of an entry of `site.json`. */
  static async load(model, progress) {
    const files = await load(model, FILES, progress);
    const made = new LanguageModel();
    made.entry = model;
    made.session = await open(files["model.onnx"], files["model.onnx.data"]);
    made.tokenizer = makeTokenizer(json(files["tokenizer.json"]));
    made.config = json(files["genai_config.json"]).model;
    made.template = template(files);
    made.adapters = { "": slots(made.session) };
    made.forget();
    return made;
  }

  /** Ids of a conversation: `[{role, content}, ...]`, or one plain text. */
  encode(messages) {
    const text =
      this.template?.render({ messages, add_generation_prompt: true }) ??
      messages.at(-1).content;
    // A template writes the tokens that a text starts with itself.
    const add_special_tokens = !this.template;
    return this.tokenizer.encode(text, { add_special_tokens }).ids;
  }

  /**
   * Generates `{id, text}` until the model ends or `limit` tokens are there;
   * without `id` while it reads.
   */
  async *generate(ids, { adapter = "", limit = 256 } = {}) {
    const factors = (this.adapters[adapter] ??= await this.#read(adapter));
    const ends = new Set([this.config.eos_token_id ?? []].flat());
    const decoder = new Decoder(this.tokenizer);
    const room = this.config.context_length - ids.length;
    if (room < 1)
      throw new Error(
        `The conversation has ${ids.length} tokens, and the model has room ` +
          `for ${this.config.context_length}. Start a new one.`,
      );
    let next = this.#continue(ids, adapter);
    for (let count = 0; count < Math.min(limit, room); ) {
      const piece = next.splice(0, this.seen.length ? PIECE : 1);
      const id = await this.#step(piece, factors);
      if (next.length) {
        yield { text: "" };
        continue;
      }
      if (ends.has(id)) return;
      yield { id, text: decoder.add(id) };
      next = [id];
      count++;
    }
  }

  /** Drops the keys and values of what has been said. */
  forget() {
    this.seen = [];
    this.cache = {};
    this.session.inputMetadata
      .filter(({ name }) => CACHE.test(name))
      .forEach(({ name, shape: [, heads, , size] }) => {
        this.cache[name] = empty([1, heads, 0, size]);
      });
  }

  /** The ids still to be read: all, unless those seen are their beginning. */
  #continue(ids, adapter) {
    const begun =
      adapter === this.adapter &&
      this.seen.length < ids.length &&
      this.seen.every((id, at) => id === ids[at]);
    if (!begun) this.forget();
    this.adapter = adapter;
    return ids.slice(this.seen.length);
  }

  /** Reads some ids and returns the likeliest that follows. */
  async #step(ids, factors) {
    const seen = [...this.seen, ...ids];
    const { logits, ...present } = await this.session.run({
      ...this.cache,
      ...factors,
      input_ids: integers(ids),
      attention_mask: integers(seen.map(() => 1)),
    });
    for (const name of Object.keys(this.cache))
      this.cache[name] = present[name.replace(CACHE, "present.")];
    this.seen = seen;
    const size = logits.dims.at(-1);
    return largest(logits.data.subarray(logits.data.length - size));
  }

  async #read(adapter) {
    const name = this.entry.adapters[adapter];
    const { [name]: bytes } = await load(this.entry, [name]);
    return { ...this.adapters[""], ...safetensors(bytes) };
  }
}

function template(files) {
  const text = files["chat_template.jinja"];
  if (text) return new Template(new TextDecoder().decode(text));
  const settings = json(files["tokenizer_config.json"]);
  return settings.chat_template && new Template(settings.chat_template);
}

/** What the places of adapters hold where there is none: rank 0. */
function slots(session) {
  const found = {};
  for (const { name, shape } of session.inputMetadata)
    if (/\.lora_[ab]$/.test(name))
      found[name] = empty(shape.map((size) => (isNaN(size) ? 0 : size)));
  return found;
}

const empty = (shape) => new Tensor("float32", new Float32Array(0), shape);

/** Tensors of a safetensors file, all of them float32. */
function safetensors(bytes) {
  const view = new DataView(bytes.buffer);
  const start = 8 + Number(view.getBigUint64(0, true));
  const found = {};
  for (const [name, entry] of Object.entries(json(bytes.subarray(8, start)))) {
    if (name === "__metadata__") continue;
    const [from, to] = entry.data_offsets.map((at) => start + at);
    const data = new Float32Array(bytes.slice(from, to).buffer);
    found[name] = new Tensor("float32", data, entry.shape);
  }
  return found;
}

function largest(values) {
  let at = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[at]) at = i;
  return at;
}
