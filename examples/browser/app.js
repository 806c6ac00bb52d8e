// The page: tabs, a form for each model, and what their workers say.

const $ = (id) => document.getElementById(id);

/** A model in a worker of its own, asked for one thing at a time. */
class Model {
  constructor(kind, entry, listen) {
    this.kind = kind;
    this.entry = entry;
    this.listen = listen;
    this.worker = new Worker("worker.js", { type: "module" });
    this.worker.onmessage = ({ data }) => this.#hear(data);
    this.worker.onerror = ({ message }) =>
      this.#hear({ type: "error", message: message || "The worker failed." });
  }

  ask(call, settings = {}) {
    this.worker.postMessage({ call, ...settings });
    return new Promise((resolve, reject) => {
      this.resolve = resolve;
      this.reject = reject;
    });
  }

  stop() {
    this.worker.postMessage({ call: "stop" });
  }

  #hear({ type, message, ...data }) {
    if (type === "done") this.resolve(data);
    else if (type === "error") this.reject(new Error(message));
    else this.listen(type, data);
  }
}

// -- Loading -----------------------------------------------------------------

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

function size({ files }) {
  const all = Object.values(files);
  return all.reduce((total, { bytes }) => total + bytes, 0);
}

/** Loads the model of a tab when its button is pressed. */
function prepare(kind, entry, on = {}) {
  const say = (text) => ($(`${kind}-status`).textContent = text);
  const fail = (error) => {
    say(error.message);
    $(`${kind}-status`).classList.add("error");
  };
  const bar = $(`${kind}-progress`);
  const model = new Model(kind, entry, (type, data) => {
    if (type !== "progress") return on[type]?.(data);
    bar.hidden = false;
    bar.value = data.loaded / data.total;
    say(`${megabytes(data.loaded)} of ${megabytes(data.total)}`);
  });
  const button = $(`${kind}-load`);
  button.textContent = `Load the model (${megabytes(size(entry))})`;
  button.onclick = async () => {
    button.disabled = true;
    say("Loading …");
    try {
      const { seconds, threads } = await model.ask("load", { kind, entry });
      const plural = threads === 1 ? "thread" : "threads";
      say(`Ready after ${seconds.toFixed(1)} s, ${threads} ${plural}.`);
      $(`${kind}-fields`).disabled = false;
      $(`${kind}-loading`).classList.add("loaded");
      $(`${kind}-text`).focus();
    } catch (error) {
      fail(error);
      button.disabled = false;
    }
    bar.hidden = true;
  };
  return { model, say, fail };
}

// -- Classifier --------------------------------------------------------------

function startClassifier(entry) {
  const { model, say, fail } = prepare("classifier", entry);
  $("classifier-form").onsubmit = async (event) => {
    event.preventDefault();
    const text = $("classifier-text").value.trim();
    if (!text) return;
    $("classifier-fields").disabled = true;
    try {
      const { found, milliseconds } = await model.ask("classify", { text });
      $("classes").replaceChildren(...found.map(classRow));
      say(`${milliseconds.toFixed(0)} ms`);
    } catch (error) {
      fail(error);
    }
    $("classifier-fields").disabled = false;
    $("classifier-text").focus();
  };
}

function classRow({ label, share }) {
  const row = $("class-row").content.cloneNode(true);
  row.querySelector(".label").textContent = label;
  row.querySelector(".share").textContent = `${(100 * share).toFixed(1)}%`;
  row.querySelector(".fill").style.width = `${100 * share}%`;
  return row;
}

// -- Chat --------------------------------------------------------------------

function startChat(entry) {
  let messages = [];
  let answer;
  const { model, say, fail } = prepare("chat", entry, {
    token: ({ text }) => {
      if (!answer.textContent) say("Writing …");
      const follow = atEnd();
      answer.textContent += text;
      if (follow) scrollTo(0, document.body.scrollHeight);
    },
  });
  for (const name of Object.keys(entry.adapters))
    $("adapter").append(new Option(name, name));
  $("adapter-row").hidden = !Object.keys(entry.adapters).length;

  const busy = (is) => {
    $("chat-text").readOnly = $("send").disabled = is;
    $("adapter").disabled = $("new").disabled = is;
    $("stop").disabled = !is;
    $("messages").ariaBusy = is;
  };
  $("chat-form").onsubmit = async (event) => {
    event.preventDefault();
    const content = $("chat-text").value.trim();
    if (!content || $("send").disabled) return;
    $("chat-text").value = "";
    messages.push({ role: "user", content });
    bubble("user", content);
    const adapter = $("adapter").value;
    answer = bubble("assistant", "", adapter);
    busy(true);
    say("Reading …");
    try {
      const done = await model.ask("generate", { messages, adapter });
      messages.push({ role: "assistant", content: answer.textContent });
      answer.dataset.ids = done.ids.join(" ");
      say(
        `${done.ids.length} tokens, the first after ` +
          `${done.wait.toFixed(1)} s, then ${done.rate.toFixed(1)} per second.`,
      );
    } catch (error) {
      messages.pop();
      fail(error);
    }
    busy(false);
    $("chat-text").focus();
  };
  $("chat-text").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("chat-form").requestSubmit();
    }
  };
  $("stop").onclick = () => model.stop();
  $("new").onclick = () => {
    messages = [];
    $("messages").replaceChildren();
    say("");
    $("chat-text").focus();
  };
}

function bubble(role, text, adapter = "") {
  const row = $("message").content.cloneNode(true);
  row.querySelector("li").classList.add(role);
  row.querySelector(".who").textContent =
    role === "user" ? "You" : ["Model", adapter].filter(Boolean).join(", ");
  const body = row.querySelector(".text");
  body.textContent = text;
  $("messages").append(row);
  scrollTo(0, document.body.scrollHeight);
  return body;
}

/** Whether the newest words are in sight, and should stay so. */
function atEnd() {
  return innerHeight + scrollY > document.body.scrollHeight - 100;
}

// -- Tabs --------------------------------------------------------------------

const START = { classifier: startClassifier, chat: startChat };

function show(kind) {
  for (const other of Object.keys(START)) {
    const chosen = other === kind;
    $(`${other}-tab`).ariaSelected = chosen;
    $(`${other}-tab`).tabIndex = chosen ? 0 : -1;
    $(other).hidden = !chosen;
  }
}

async function start() {
  const site = await (await fetch("site.json")).json();
  const kinds = Object.keys(START).filter((kind) => site[kind]);
  for (const kind of Object.keys(START)) {
    const tab = $(`${kind}-tab`);
    tab.hidden = !site[kind];
    tab.onclick = () => show(kind);
  }
  $("tabs").hidden = kinds.length < 2;
  $("tabs").onkeydown = ({ key }) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[key];
    if (!step) return;
    const at = kinds.findIndex((kind) => !$(kind).hidden);
    const next = kinds.at((at + step) % kinds.length);
    show(next);
    $(`${next}-tab`).focus();
  };
  for (const kind of kinds) START[kind](site[kind]);
  show(kinds.includes(location.hash.slice(1)) ? location.hash.slice(1) : kinds[0]);
}

start();
