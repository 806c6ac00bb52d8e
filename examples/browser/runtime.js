// ONNX Runtime, and files that are kept once they have come.

import * as ort from "./libraries/ort.js";

// Threads share memory, which browsers allow only on pages that their server
// isolates (see `serve.py`). More than four gain nothing on a phone.
const cores = navigator.hardwareConcurrency ?? 1;
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(cores, 4) : 1;
ort.env.wasm.wasmPaths = new URL("./libraries/", import.meta.url).href;

export const threads = ort.env.wasm.numThreads;
export const Tensor = ort.Tensor;

/** A session of the model in `bytes`, its weights beside it or within. */
export function open(bytes, weights) {
  const externalData = weights && [{ path: "model.onnx.data", data: weights }];
  return ort.InferenceSession.create(bytes, {
    externalData,
    graphOptimizationLevel: "all",
  });
}

/** Int64 values, as ids and masks are. */
export function integers(values) {
  const data = BigInt64Array.from(values, BigInt);
  return new Tensor("int64", data, [1, data.length]);
}

/**
 * Files by name, as bytes. `model` is an entry of `site.json`, and
 * `progress(loaded, total)` hears of bytes.
 */
export async function load(model, names, progress) {
  const files = names.filter((name) => model.files[name]);
  const total = sum(files.map((name) => model.files[name].bytes));
  let loaded = 0;
  const found = {};
  for (const name of files) {
    found[name] = await download(model, name, (bytes) =>
      progress?.((loaded += bytes), total),
    );
  }
  return found;
}

export const json = (bytes) => JSON.parse(new TextDecoder().decode(bytes));

async function download(model, name, progress) {
  const { bytes: size, hash } = model.files[name];
  const url = `${model.folder}/${name}?${hash}`;
  const response = await stored(url);
  const bytes = new Uint8Array(size);
  let end = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if (end + value.length > size) break;
    bytes.set(value, end);
    end += value.length;
    progress(value.length);
  }
  if (end !== size)
    throw new Error(
      `${name} has ${end} bytes instead of ${size}. Reload the page; if that ` +
        "does not help, make the site anew.",
    );
  return bytes;
}

/** A response from the browser's own store, where it goes the first time. */
async function stored(url) {
  const store = await self.caches?.open("models");
  const kept = await store?.match(url);
  if (kept) return kept;
  const response = await fetch(url);
  if (!response.ok)
    throw new Error(`${url} cannot be had: ${response.status}.`);
  if (store) store.put(url, response.clone()).catch(() => {});
  return response;
}

const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
