"""The catalog of findings: every check by its number, with why it matters and what to do about it.

Numbers are stable: 1xx files, 2xx tensors against config, 3xx the MTP layer, 4xx quantization, 5xx values (they need
`--check`, which reads the data).
"""

from dataclasses import dataclass

from converters.findings import Severity

_FAIL, _WARN = Severity.FAIL, Severity.WARN
_FETCH = "Fetch the file again, or take it from the original checkpoint."
_AGAIN = "Quantize the original again."
_ONE_SCALE = "Quantize the original again with one scale per group."
_WHICH = "Find out which of the two is wrong: the checkpoint may be another model's, or was edited by hand."


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that can be wrong. FAIL: the checkpoint cannot be trusted or loaded. WARN: a reader must judge."""

    number: int
    severity: Severity
    title: str
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class CheckFinding:
    """A check that did not hold. `expected` and `found` are without a verb."""

    check: Check
    subject: str
    expected: str
    found: str

    @property
    def is_fatal(self) -> bool:
        """Whether the checkpoint is corrupt or incomplete because of it."""
        return self.check.severity is Severity.FAIL

    def __str__(self) -> str:
        """Return number and facts as one line."""
        return f"{self.check.number} {self.subject}: expected {self.expected}, found {self.found}"


UNFINISHED = Check(
    101,
    _FAIL,
    "unfinished",
    "The run that writes this folder has not ended; files are missing or partly written.",
    "Run the command that was writing it again; it goes on from where it stopped.",
)
CONFIG = Check(
    102,
    _FAIL,
    "config.json unusable",
    "Without it nobody knows which tensors there must be.",
    "Take config.json from the original checkpoint.",
)
NO_WEIGHTS = Check(103, _FAIL, "no weights", "There is no safetensors file to read.", "Fetch the weights.")
INDEX = Check(
    104,
    _FAIL,
    "index unusable",
    "Loaders find tensors through the index.",
    "Fetch model.safetensors.index.json again, or write the checkpoint anew with `glm4moe convert`.",
)
FILE_MISSING = Check(105, _FAIL, "file missing", "The index sends loaders to a file that is not there.", _FETCH)
FILE_DAMAGED = Check(106, _FAIL, "file damaged", "It is cut off, or is not what the format allows.", _FETCH)
INDEX_DISAGREES = Check(
    107,
    _FAIL,
    "index disagrees with headers",
    "Loaders that trust the index miss these tensors or look for them in the wrong file.",
    "Fetch index and files of one and the same revision.",
)
TENSOR_TWICE = Check(
    108, _FAIL, "tensor twice", "Which copy is loaded depends on the loader.", "Remove the file that does not belong."
)
FILE_UNLISTED = Check(
    109,
    _WARN,
    "file not in the index",
    "Loaders that follow the index ignore it, others read it.",
    "Remove it if it is left over; `glm4moe convert` writes an index that lists an MTP file.",
)
TOTAL_SIZE = Check(
    110,
    _WARN,
    "total_size of the index wrong",
    "Some tools plan memory with it. Several published FP8 checkpoints have it wrong.",
    "None needed; `glm4moe convert` writes the right number.",
)
CUSTOM_CODE = Check(
    111,
    _WARN,
    "brings its own code",
    "Loaders with remote code enabled would run it. It is never run or copied here.",
    "Read it before any other tool opens the checkpoint with remote code enabled.",
)

TENSOR_MISSING = Check(
    201,
    _FAIL,
    "tensors missing",
    "The config asks for them; engines refuse to load or run with random values.",
    "Fetch the checkpoint again. `glm4moe inspect CKPT --missing` lists all of them.",
)
LAYER_MISSING = Check(
    202, _FAIL, "layer missing", "The config announces more layers than the files hold.", f"Fetch it again. {_WHICH}"
)
LAYER_ADDITIONAL = Check(
    203, _FAIL, "layer beyond the config", "The files hold a layer that the config does not announce.", _WHICH
)
TENSOR_UNEXPECTED = Check(
    204,
    _FAIL,
    "unexpected tensors",
    "They are not part of the model that the config describes; some engines refuse, others ignore them.",
    _WHICH,
)
NO_CORRECTION_BIAS = Check(
    205,
    _WARN,
    "no correction bias",
    "No layer has the router's correction bias, as in some pruned derivatives; engines take it as zero or refuse.",
    "Check with its publisher that the experts are meant to be chosen without it.",
)
SHAPE = Check(206, _FAIL, "wrong shape", "It contradicts the sizes in config.json.", _WHICH)
DTYPE = Check(207, _FAIL, "wrong dtype", "Loaders would refuse it or read its bytes as something else.", _WHICH)
CORRECTION_BIAS_ROUNDED = Check(
    208,
    _FAIL,
    "correction bias not fp32",
    "Below fp32 its values fall together, and other experts are chosen for most tokens.",
    "Take the fp32 tensors from the original checkpoint; rounding cannot be undone.",
)
LAYOUTS_MIXED = Check(
    209,
    _FAIL,
    "two layouts in one checkpoint",
    "Half of it is stored as another layout stores it; no loader reads both.",
    "Fetch it again, or convert the original anew with `glm4moe convert`.",
)

MTP_INCOMPLETE = Check(
    301,
    _FAIL,
    "MTP layer incomplete",
    "Speculative decoding with it fails to load or drafts nonsense.",
    "Fetch the MTP tensors from the original checkpoint, or drop the layer with `glm4moe convert --mtp drop`.",
)
MTP_ABSENT = Check(
    302,
    _WARN,
    "MTP layer announced but absent",
    "Engines started with MTP speculation fail to load it.",
    "Set num_nextn_predict_layers to 0, or add the layer from the original checkpoint.",
)

QUANTIZATION_UNKNOWN = Check(
    401,
    _WARN,
    "quantization not checked",
    "This tool does not implement the scheme, so scales were not held against the config.",
    "None needed to inspect it; convert and quantize may refuse it.",
)
QUANTIZATION_DISAGREES = Check(
    402,
    _FAIL,
    "quantization contradicts the files",
    "An engine believes quantization_config and would read codes as weights, or weights as codes.",
    "Take config.json and weights from one and the same checkpoint.",
)
SCALE_MISSING = Check(403, _FAIL, "scale missing", "Codes without their scale cannot be turned into weights.", _FETCH)
HEAD_QUANTIZED = Check(
    404,
    _WARN,
    "quantized where engines expect plain weights",
    "Engines that build this module unquantized skip its scale and load wrong values.",
    "Dequantize it, or make sure that the engine applies the scale; an MTP head may be left to the main one.",
)
IGNORE_INCOMPLETE = Check(
    405,
    _WARN,
    "ignore list incomplete",
    "The module is stored plain, but an engine that goes by the list alone builds it quantized.",
    "Add the module to quantization_config.ignore.",
)
WEIGHT_TWICE = Check(
    406,
    _FAIL,
    "plain weight beside its codes",
    "Which of the two is loaded depends on the engine; most refuse.",
    "Remove the one that config.json does not declare, or quantize the original again.",
)
MTP_CACHE_SCALE = Check(
    407,
    _WARN,
    "KV-cache scale in the MTP layer",
    "vLLM's loader of the MTP layer knows no such tensor and stops.",
    "Leave it out: the MTP layer's cache is not scaled.",
)
HALF_QUANTIZED = Check(
    408,
    _WARN,
    "a fused group half quantized",
    "Engines build q, k and v, gate and up, and all experts of a layer as one module with one format, and refuse this.",
    "Quantize the original again, with all or nothing of the group.",
)
ENGINE_READS = Check(
    409,
    _WARN,
    "an engine reads the ignore list otherwise",
    "It would build the module in another form than it is stored in, and refuse it or load wrong values.",
    "Add the module in the words of that engine: exact names and re: patterns for vLLM and SGLang, globs for "
    "TensorRT-LLM; `glm4moe quantize` writes all of them.",
)

NON_FINITE = Check(501, _FAIL, "NaN or Inf", "One such value makes every output NaN.", _FETCH)
ALL_ZERO = Check(502, _FAIL, "all zero", "A weight of zeros only is a file that was never filled.", _FETCH)
CONSTANT = Check(503, _FAIL, "constant", "A weight with one value only was overwritten or never filled.", _FETCH)
VECTOR_CONSTANT = Check(
    504,
    _WARN,
    "constant vector",
    "A trained norm or bias rarely has one value only; it may never have been trained or loaded.",
    "Compare it with the original checkpoint.",
)
HOLE = Check(
    505,
    _WARN,
    "zeros in the middle of a weight",
    "A long run of zero bytes is what a lost block of a download looks like.",
    _FETCH,
)
SCALE_VALUE = Check(
    506,
    _FAIL,
    "scale zero, negative or not finite",
    "It turns a block of weights into zeros, mirrors it, or makes every output NaN.",
    _AGAIN,
)
FUSED_SCALES = Check(
    507,
    _FAIL,
    "unequal scales in a fused group",
    "Engines multiply these weights as one and take one member's scale for all of them.",
    _ONE_SCALE,
)
FUSED_SCALES_REQUANTIZED = Check(
    508,
    _WARN,
    "unequal per-tensor scales in a fused group",
    "Engines round these weights a second time, to the largest scale of the group.",
    _ONE_SCALE,
)
GLOBAL_IS_ONE = Check(
    510,
    _WARN,
    "NVFP4 global scale never computed",
    "A scale of exactly 1 is what writers leave where no calibration ran; activations lose precision, weights clip.",
    "Calibrate and quantize the original again.",
)
UNREADABLE = Check(
    509, _FAIL, "unreadable", "The disk or network file system does not return the data.", f"Check the disk. {_FETCH}"
)
