"""One engine in a process of its own, which obeys commands over a pipe.

A line in is a JSON list, a command and its arguments; a line out is what it
returned, which for most commands is the seconds that it took.
"""

import concurrent.futures
import ctypes
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import numpy as np


class Genai:
    """A folder in onnxruntime-genai."""

    ROOM = 512

    def __init__(self):
        import onnxruntime_genai

        self.genai = onnxruntime_genai

    def load(self, path, threads):
        config = self.genai.Config(path)
        settings = {"intra_op_num_threads": threads, "log_severity_level": 3}
        decoder = {"decoder": {"session_options": settings}}
        config.overlay(json.dumps({"model": decoder}))
        self.model = self.genai.Model(config)

    def reset(self):
        options = self.genai.GeneratorParams(self.model)
        # The end of a text is no end of the measurement.
        options.set_search_options(
            max_length=self.ROOM, min_length=self.ROOM - 1, do_sample=False
        )
        self.generator = self.genai.Generator(self.model, options)

    def prefill(self, ids):
        self.generator.append_tokens(np.array(ids, "int32"))
        self.generator.generate_next_token()

    def step(self):
        self.generator.generate_next_token()


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class Settings(ctypes.Structure):
    """Settings as llama.cpp hands them out, in more room than they take."""

    _fields_ = (("bytes", ctypes.c_char * 1024),)


class LlamaCpp:
    """A file in llama.cpp, by the C interface of the library in `xllamacpp`.

    The package itself only serves over HTTP.
    """

    def __init__(self):
        package = importlib.util.find_spec("xllamacpp")
        [library] = Path(package.origin).parent.glob("xllamacpp*.so")
        self.library = _llama_cpp(library)

    def load(self, path, threads):
        settings = self.library.llama_model_default_params()
        model = self.library.llama_model_load_from_file(path.encode(), settings)
        settings = self.library.llama_context_default_params()
        self.context = self.library.llama_init_from_model(model, settings)
        if not self.context:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self.library.llama_set_n_threads(self.context, threads, threads)
        self.vocabulary = self.library.llama_vocab_n_tokens(
            self.library.llama_model_get_vocab(model)
        )

    def reset(self):
        memory = self.library.llama_get_memory(self.context)
        self.library.llama_memory_clear(memory, True)

    def prefill(self, ids):
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        batch = self.library.llama_batch_get_one(tokens, len(ids))
        if self.library.llama_decode(self.context, batch):
            raise RuntimeError("llama.cpp does not decode")
        row = self.library.llama_get_logits_ith(self.context, -1)
        row = np.ctypeslib.as_array(row, (self.vocabulary,))
        self.next = int(row.argmax())

    def step(self):
        self.prefill([self.next])

    def logits(self, ids):
        batch = self.library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for n, id in enumerate(ids):
            batch.token[n], batch.pos[n], batch.logits[n] = id, n, 1
            batch.n_seq_id[n], batch.seq_id[n][0] = 1, 0
        self.reset()
        if self.library.llama_decode(self.context, batch):
            raise RuntimeError("llama.cpp does not decode")
        rows = self.library.llama_get_logits(self.context)
        return np.ctypeslib.as_array(rows, (len(ids), self.vocabulary))


def _llama_cpp(path):
    """The library, and of its functions what ctypes cannot know."""
    library = ctypes.CDLL(str(path))
    library.llama_log_set(_QUIET, None)
    library.llama_backend_init()
    pointer, rows = ctypes.c_void_p, ctypes.POINTER(ctypes.c_float)
    for name, result, arguments in (
        ("model_default_params", Settings, []),
        ("context_default_params", Settings, []),
        ("model_load_from_file", pointer, [ctypes.c_char_p, Settings]),
        ("init_from_model", pointer, [pointer, Settings]),
        ("set_n_threads", None, [pointer, ctypes.c_int, ctypes.c_int]),
        ("model_get_vocab", pointer, [pointer]),
        ("vocab_n_tokens", ctypes.c_int32, [pointer]),
        ("get_memory", pointer, [pointer]),
        ("memory_clear", None, [pointer, ctypes.c_bool]),
        ("batch_get_one", Batch, [pointer, ctypes.c_int32]),
        ("batch_init", Batch, [ctypes.c_int32] * 3),
        ("decode", ctypes.c_int32, [pointer, Batch]),
        ("get_logits", rows, [pointer]),
        ("get_logits_ith", rows, [pointer, ctypes.c_int32]),
    ):
        function = getattr(library, f"llama_{name}")
        function.restype, function.argtypes = result, arguments
    return library


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _QUIET(level, text, data):
    """Takes llama.cpp's log."""


class Graph:
    """The graph of a folder in ONNX Runtime, for its logits."""

    def __init__(self):
        import onnxruntime

        self.onnxruntime = onnxruntime

    def load(self, path, threads):
        settings = (Path(path) / "genai_config.json").read_text("utf-8")
        decoder = json.loads(settings)["model"]["decoder"]
        options = self.onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        self.session = self.onnxruntime.InferenceSession(
            Path(path) / decoder["filename"], options
        )
        heads, width = decoder["num_key_value_heads"], decoder["head_size"]
        empty = np.zeros((1, heads, 0, width), "float32")
        self.past = {
            value.name: empty
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values")
        }

    def logits(self, ids):
        feed = {"input_ids": np.array([ids], "int64")}
        feed["attention_mask"] = np.ones((1, len(ids)), "int64")
        [logits] = self.session.run(["logits"], feed | self.past)
        return logits[0]


class Memory:
    """Nothing but reading: what no engine can be faster than."""

    def load(self, size, threads):
        self.pool = concurrent.futures.ThreadPoolExecutor(threads)
        size = int(size) // threads
        self.parts = [np.ones(size // 4, "int32") for _ in range(threads)]

    def step(self):
        if len(self.parts) == 1:
            self.parts[0].max()
        else:
            list(self.pool.map(np.max, self.parts))


KINDS = {k.__name__: k for k in (Genai, LlamaCpp, Graph, Memory)}


def loss(engine, rows):
    """Mean negative log-likelihood of rows of ids."""
    found = []
    for ids in rows:
        logits = engine.logits(ids)[:-1].astype("float64")
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = logits[np.arange(len(ids) - 1), ids[1:]]
        found.append(np.log(np.exp(logits).sum(axis=-1)) - chosen)
    return [float(row.mean()) for row in found]


def peak_memory():
    """The most bytes of this process that were in memory at once."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmHWM")


def main():
    kind, path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    # What libraries print is no answer.
    os.dup2(2, 1)
    engine = KINDS[kind]()
    # Time of all threads of the process, which neighbors do not take, as long
    # as it computes with one; with several, waiting for each other counts.
    clock = time.process_time if threads == 1 else time.perf_counter

    def timed(clock, name, *arguments):
        start = clock()
        getattr(engine, name)(*arguments)
        return clock() - start

    commands = {
        "load": lambda: timed(time.perf_counter, "load", path, threads),
        "reset": lambda: timed(clock, "reset"),
        "prefill": lambda ids: timed(clock, "prefill", ids),
        "steps": lambda count: [timed(clock, "step") for _ in range(count)],
        "loss": lambda rows: loss(engine, rows),
        "peak_memory": peak_memory,
    }
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(commands[name](*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main()
