"""llama.cpp: a control vector by `llama_apply_adapter_cvec`, on a float32 GGUF model with a float32 cache.

The file is read as `common_control_vector_load` of llama.cpp reads it: the vector of block n stands at (n - 1) * width, block 0 has none.
"""

from __future__ import annotations

import ctypes
from contextlib import contextmanager

import numpy as np
import torch
from gguf import GGUFReader
from llama import _llama_cpp_cpu as llama_cpp
from llama._llama_cpp_cpu import ffi, lib

DISTRIBUTIONS = ("llama-cpp-cffi", "gguf")
FLOAT32 = 0  # of ggml's types


class Arm:
    def __init__(self, model, tokenizer):
        config = model.config
        self.layers, self.width, self.vocabulary = config.num_hidden_layers, config.hidden_size, config.vocab_size

    @contextmanager
    def applied(self, setting):
        lib.llama_backend_init()
        self.llama = lib.llama_model_load_from_file(setting["model"].encode(), lib.llama_model_default_params())
        parameters = lib.llama_context_default_params()
        parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = 256, 1, 1
        parameters.type_k = parameters.type_v = FLOAT32
        parameters.flash_attn = False
        self.context = lib.llama_init_from_model(self.llama, parameters)
        table = np.zeros((self.layers - 1, self.width), dtype=np.float32)
        for tensor in GGUFReader(setting["control_vector"]).tensors:
            table[int(tensor.name.removeprefix("direction.")) - 1] = tensor.data
        # the library has the function, its Python module does not
        apply = ctypes.CDLL(llama_cpp.__file__).llama_apply_adapter_cvec
        apply.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)
        context = int(ffi.cast("uintptr_t", self.context))
        checked("llama_apply_adapter_cvec", apply(context, table.ctypes.data, table.size, self.width, 1, self.layers))
        yield

    def forward(self, ids):
        """Logits of the last token, [1, 1, vocabulary]."""
        tokens = ffi.new("llama_token[]", ids[0].tolist())
        checked("llama_decode", lib.llama_decode(self.context, lib.llama_batch_get_one(tokens, ids.shape[1])))
        logits = ffi.buffer(lib.llama_get_logits_ith(self.context, -1), 4 * self.vocabulary)
        return torch.from_numpy(np.frombuffer(bytes(logits), dtype=np.float32).copy())[None, None]


def checked(name, status):
    if status:
        raise RuntimeError(f"{name} returned {status}")
