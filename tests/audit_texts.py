"""Texts of made-up SGLang modules for the tests of the audit."""

from __future__ import annotations

TEXT = """
import functools
from sglang.other import Shared, table

state = None
cache: dict = {}
names = []

class Kept:
    made = 0
    seen = []

    def count(self):
        Kept.made += 1
        type(self).seen.append(1)

    @classmethod
    def clear(cls):
        cls.seen = []

@functools.lru_cache
def once(key=None): return 1

def write():
    global state
    state = 1
    cache["a"] = 2
    names.append(3)
    table["a"] = 4
    Shared.x = 5

def local():
    cache = {}
    cache["a"] = 1
    names = []
    names.append(2)
"""

#: A module that writes to objects outside SGLang.
ELSEWHERE = """
import os
import torch.nn as nn
from contextlib import contextmanager

@contextmanager
def patched():
    before = nn.Module.extra_repr
    nn.Module.extra_repr = None
    try:
        yield
    finally:
        nn.Module.extra_repr = before

def configure(name):
    import torch._dynamo.config
    import torch.backends.cuda as cuda
    torch._dynamo.config.cache_size_limit = 8
    cuda.matmul.allow_tf32 = True
    setattr(nn, "made_up", 1)
    os.environ["MADE_UP"] = "1"
    os.environ[name] = "1"

def not_a_global(nn):
    nn.x = 1
    os = nn
    os.environ["LOCAL"] = "1"
"""
