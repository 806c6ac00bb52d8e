// Texts to ids and back, as `tokenizer.json` says.

import { Tokenizer } from "./libraries/tokenizers.js";

// The library reads three things otherwise than Python's `tokenizers`; saying
// them in other words makes both give the same ids.
const WORDS = {
  // It would look the name of a special token up as if it were the token.
  TemplateProcessing: (step) => ({
    ...step,
    single: named(step.single, step.special_tokens),
    pair: named(step.pair, step.special_tokens),
  }),
  // It would keep a plain text that is to be removed.
  Split: (step) =>
    step.pattern.String === undefined
      ? step
      : { ...step, pattern: { Regex: escaped(step.pattern.String) } },
  // It would not take "½" for a number.
  Digits: (step) => ({
    type: "Split",
    pattern: { Regex: step.individual_digits ? "\\p{N}" : "\\p{N}+" },
    behavior: "Isolated",
    invert: false,
  }),
};

/** A tokenizer of the settings in `tokenizer.json`. */
export function makeTokenizer(settings) {
  return new Tokenizer(reworded(settings), {
    clean_up_tokenization_spaces: false,
  });
}

function reworded(settings) {
  const each = (step) => {
    if (!step) return step;
    const inner = { ...step };
    for (const key of ["pretokenizers", "processors"])
      if (step[key]) inner[key] = step[key].map(each);
    return WORDS[step.type]?.(inner) ?? inner;
  };
  return {
    ...settings,
    pre_tokenizer: each(settings.pre_tokenizer),
    post_processor: each(settings.post_processor),
  };
}

function named(template, tokens) {
  return template.flatMap((item) =>
    item.SpecialToken
      ? tokens[item.SpecialToken.id].tokens.map((id) => ({
          SpecialToken: { ...item.SpecialToken, id },
        }))
      : [item],
  );
}

function escaped(text) {
  return text.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&");
}

/** Text of ids that come one by one; what is not a whole letter yet waits. */
export class Decoder {
  #ids = [];
  #said = "";

  constructor(tokenizer) {
    this.tokenizer = tokenizer;
  }

  /** What the text grows by. */
  add(id) {
    this.#ids.push(id);
    const text = this.tokenizer.decode(this.#ids, {
      skip_special_tokens: true,
    });
    if (text.endsWith("\uFFFD")) return "";
    const grown = text.slice(this.#said.length);
    this.#said = text;
    return grown;
  }
}
