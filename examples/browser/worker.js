// One model, away from the page, which therefore never waits for it.

import { Classifier } from "./classifier.js";
import { LanguageModel } from "./language_model.js";
import { threads } from "./runtime.js";

const KINDS = { classifier: Classifier, chat: LanguageModel };
let model;
let stopped;

const CALLS = {
  async load({ kind, entry }) {
    const start = performance.now();
    let shown = 0;
    model = await KINDS[kind].load(entry, (loaded, total) => {
      // Thousands of pieces come: a hundred reports will do.
      if (loaded - shown < total / 100 && loaded < total) return;
      shown = loaded;
      postMessage({ type: "progress", loaded, total });
    });
    return { seconds: (performance.now() - start) / 1000, threads };
  },

  async classify({ text }) {
    const start = performance.now();
    const found = await model.classify(text);
    return { found, milliseconds: performance.now() - start };
  },

  async generate({ messages, ...options }) {
    stopped = false;
    const ids = model.encode(messages);
    const start = performance.now();
    const made = [];
    let first;
    for await (const { id, text } of model.generate(ids, options)) {
      if (id !== undefined) {
        made.push(id);
        first ??= performance.now();
        postMessage({ type: "token", text });
      }
      await heard();
      if (stopped) break;
    }
    const seconds = (performance.now() - (first ?? start)) / 1000;
    return {
      ids: made,
      wait: ((first ?? performance.now()) - start) / 1000,
      rate: made.length > 1 ? (made.length - 1) / seconds : 0,
    };
  },
};

/** Lets messages in that have come meanwhile. */
function heard() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = resolve;
    port2.postMessage(0);
  });
}

onmessage = async ({ data: { call, ...settings } }) => {
  if (call === "stop") {
    stopped = true;
    return;
  }
  try {
    postMessage({ type: "done", ...(await CALLS[call](settings)) });
  } catch (error) {
    postMessage({ type: "error", message: error.message });
  }
};
