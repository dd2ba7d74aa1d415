"""What the audit cannot see, or not name one by one: a reader has to look, and this is what was read.

``LINES`` are types of objects that SGLang's globals hold and whose state is in C code, and globals
that hold more than the audit reads. ``LIBRARIES`` are packages whose own globals change while
runners run, in hundreds of places that SGLang's text does not write. Each reason says why no runner
computes otherwise because of another. Read in SGLang 0.5.23, torch 2.14 and Python 3.11; what only
a GPU or Python 3.12 has, with torch 2.11. The ledger has one line for each that a CPU has.
"""

from __future__ import annotations

_FIXED = "cannot change once it is made"
_LOCK = "held or not: a lock that SGLang's code takes and releases by with statements"
_CODEC = "reads or writes messages of its type by fields that are fixed when it is made"

#: (module, names, reason)
LINES: tuple[tuple[str, str, str], ...] = (
    ("_ctypes", "CField", _FIXED),
    ("_ctypes", "CFuncPtr", "a function of a C library; its types are set where it is looked up"),
    ("_regex", "Pattern", _FIXED),
    ("_struct", "Struct", _FIXED),
    ("_thread", "RLock lock", _LOCK),
    (
        "sglang.kernels.ops.diffusion.common.fast_launch",
        "_Recording",
        "true for the thread that records a launch, until it has recorded it",
    ),
    ("msgspec._core", "_StructMixin", "its fields are read; it has no other state"),
    ("msgspec._core", "NoDefaultType LiteralInfo", _FIXED),
    ("msgspec.msgpack", "Decoder Encoder", _CODEC),
    ("msgspec.json", "Decoder Encoder", _CODEC),
    ("pydantic_core._pydantic_core", "PydanticUndefinedType", _FIXED),
    (
        "pydantic_core._pydantic_core",
        "SchemaSerializer SchemaValidator",
        "checks or writes values of its schema, which is fixed when it is made",
    ),
    (
        "pybind11_builtins",
        "pybind11_object",
        "schemas of torch's operators, and the entries of its dispatcher, which imports fill",
    ),
    (
        "pybind11_builtins",
        "pybind11_detail_function_record_v1_system_libstdcpp_gxx_abi_1xxx_use_cxx11_abi_1",
        "a function of torch's C++ code",
    ),
    (
        "torch._C",
        "_DispatchModule",
        "the operators that a library registers; `torch.operators` counts them",
    ),
    (
        "torch._C",
        "_CudaEventBase _CudaStreamBase",
        "an event or a stream of CUDA; the globals that hold it say who uses it",
    ),
    ("tvm_ffi.core", "CObject Function", "a module or a function of a compiled kernel"),
    ("typing", "Generic ParamSpec", _FIXED),
    (
        "torch.jit",
        "torch.jit.ScriptFunction",
        "activations of Phi3Small and DeepSeek-OCR (SGLang 0.5.22 and earlier), which TorchScript "
        "specialises by dtypes and shapes behind guards; on a CPU it fuses nothing (torch 2.13, 2.14)",
    ),
    (
        "zmq.backend.cython._zmq",
        "Context",
        "threads that move messages between sockets; unused in forwards",
    ),
)

_COMPILER = (
    "state of torch.compile, which compiles one frame at a time under torch's own lock; its caches "
    "are keyed by code, guards and configuration"
)
_IMPORTS = "filled by imports, and caches keyed by their arguments"
_KEYED = "caches keyed by their arguments"

#: Packages of torch's compiler, whose objects are not read where SGLang's functions hold them. A
#: kernel of Triton has what was compiled for it, by the types of its arguments.
COMPILER = (
    *("torch._decomp", "torch._dynamo", "torch._functorch", "torch._guards"),
    *("torch._higher_order_ops", "torch._inductor", "torch._logging", "torch._ops"),
    *("torch._prims", "torch._refs", "torch._subclasses", "torch.compiler", "torch.fx"),
    *("torch.overrides", "triton"),
)
#: Package -> reason.
LIBRARIES: dict[str, str] = {
    **dict.fromkeys(COMPILER, _COMPILER),
    **dict.fromkeys(
        (
            *("torch._custom_class_base", "torch.autograd", "torch.jit", "torch.ops"),
            *("torch.utils", "transformers.utils", "triton", "typing", "inspect", "linecache"),
        ),
        _IMPORTS,
    ),
    **dict.fromkeys(
        (
            *("base64", "copy", "ctypes", "einops", "encodings", "fnmatch", "mpmath", "pathlib"),
            *("pkgutil", "re", "sympy", "tokenize", "torch._sources", "urllib"),
        ),
        _KEYED,
    ),
    "__triton_launcher": "the name of every module by which Triton launches a kernel; each is kept",
    "cutlass": "quack, a library of kernels, adds its own methods when it is imported",
    "filelock": "counts and lists the file locks that are held while code is compiled",
    "multiprocessing": "hooks that run after a fork, and the start method that tqdm's lock fixes",
    "tempfile": "draws the names of temporary files",
    "tqdm": "locks and a thread of progress bars",
}

REASONS: dict[tuple[str, str], str] = {
    (module, name): reason for module, names, reason in LINES for name in names.split()
} | {(package, "*"): reason for package, reason in LIBRARIES.items()}


def is_of_the_compiler(module: str) -> bool:
    """Whether ``module`` belongs to torch's compiler."""
    return library_of(module) in COMPILER


def library_of(module: str) -> str | None:
    """The package of ``LIBRARIES`` that has ``module``, or None."""
    while module and module not in LIBRARIES:
        module = module.rpartition(".")[0]
    return module or None
