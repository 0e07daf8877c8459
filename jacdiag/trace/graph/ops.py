"""One table of the torch operations that the tracer distinguishes, by their functions' names.

A name is what `func.__name__` gives under a TorchFunctionMode: `mul` for `torch.mul` and
`Tensor.mul`, `__mul__` for `x * y`. Sets that look alike differ on purpose: each holds what its
one question needs.
"""

from __future__ import annotations

# -- Products ---------------------------------------------------------------------------------

CONVOLUTIONS = frozenset(
    {
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
    }
)
# A recurrent layer over all its steps.
RECURRENT = frozenset({"gru", "lstm", "rnn_tanh", "rnn_relu"})
# One step of a recurrent network.
RECURRENT_CELLS = frozenset({"gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell"})
# One product for each group of rows, as in a mixture of experts.
GROUPED_PRODUCTS = frozenset({"_grouped_mm", "grouped_mm"})
# The attention of torch that holds its own projections.
FUSED_MULTI_HEAD = "multi_head_attention_forward"
# Everything that multiplies by a matrix. It counts as a product of the model only if one factor is
# made of parameters.
PRODUCTS = (
    CONVOLUTIONS
    | RECURRENT
    | RECURRENT_CELLS
    | GROUPED_PRODUCTS
    | {
        "linear",
        "matmul",
        "mm",
        "bmm",
        "addmm",
        "addmm_",
        "baddbmm",
        "baddbmm_",
        "einsum",
        "__matmul__",
        "__rmatmul__",
        "bilinear",
        FUSED_MULTI_HEAD,
        "_scaled_mm",
        "tensordot",
        "inner",
        "mv",
        "addmv",
        "chain_matmul",
        "multi_dot",
    }
)
# Mix positions without any parameter, as attention would: a branch of their own.
MIXERS = frozenset(f"fft_{kind}fft{n}" for kind in ("", "i", "r", "ir") for n in ("", "2", "n"))
# Products of two values that both depend on the input, such as Q K^T.
BILINEAR = frozenset({"matmul", "bmm", "einsum", "__matmul__", "baddbmm"})
BILINEAR_OR_IN_PLACE = BILINEAR | {"baddbmm_"}

# -- Products by element, and divisions -----------------------------------------------------

DIVISIONS = frozenset({"div", "__truediv__"})
# A product by element that makes a new tensor.
PRODUCTS_BY_ELEMENT = frozenset({"mul", "__mul__", "__rmul__", "multiply"})
TIMES = PRODUCTS_BY_ELEMENT | {"mul_", "__imul__"}
# A product or a division by element, in place or not.
SCALINGS = frozenset({"mul", "__mul__", "__rmul__", "mul_", "__imul__"}) | {
    "div",
    "__truediv__",
    "div_",
    "__itruediv__",
}

# -- Additions ------------------------------------------------------------------------------

# Calls that add rows to a tensor at given positions. What they add is the second term, with zeros
# elsewhere.
SCATTERS = frozenset(
    {
        "index_add",
        "index_add_",
        "scatter_add",
        "scatter_add_",
        "scatter_reduce",
        "scatter_reduce_",
        "index_put",
        "index_put_",
    }
)
# Calls that may sum stacked outputs, with or without weights.
SUMS_OF_A_STACK = frozenset({"sum", "mean", "einsum", "matmul", "__matmul__", "bmm", "tensordot"})

# -- Attention, routing and activations -----------------------------------------------------

SOFTMAX = frozenset({"softmax", "log_softmax", "_softmax", "softmax_"})
SCALED_DOT_PRODUCT = frozenset({"scaled_dot_product_attention"})
FUSED_ATTENTION = SCALED_DOT_PRODUCT | {FUSED_MULTI_HEAD}
# Their presence in a branch shows that tokens are routed to experts.
ROUTING = GROUPED_PRODUCTS | {"topk", "one_hot"}
# They select or weigh the results of other products: what a router does.
CHOICES = frozenset({"topk", "softmax", "sigmoid", "argsort", "sort", "gather"})
# Non-linearities by element.
ACTIVATIONS = frozenset(
    {
        "relu",
        "gelu",
        "silu",
        "tanh",
        "sigmoid",
        "relu6",
        "leaky_relu",
        "elu",
        "selu",
        "mish",
        "softplus",
        "hardswish",
        "quick_gelu",
        "erf",
        "celu",
        "hardtanh",
        "prelu",
    }
)

# -- Norms ----------------------------------------------------------------------------------

# Norms of each token that are one call. Their value is the same however the input is scaled.
FUSED_NORMS = frozenset({"layer_norm", "rms_norm"})
# Every fused norm that takes a gain and a bias.
NORMS_WITH_GAIN = FUSED_NORMS | {"batch_norm", "group_norm", "instance_norm"}
# A mean or a norm: one number for many.
REDUCTIONS = frozenset(
    {
        "mean",
        "var",
        "std",
        "sum",
        "norm",
        "vector_norm",
        "linalg_vector_norm",
        "var_mean",
        "std_mean",
    }
)
# Calls that show that a value was normalised.
NORMALISING = REDUCTIONS | FUSED_NORMS | {"rsqrt", "normalize"}
# Calls of which a norm is made, also one that is written out by hand. Code without any of them has
# no norm. Code with one of them may have one.
PARTS_OF_NORMS = (
    NORMS_WITH_GAIN
    | {"rsqrt", "sqrt", "normalize", "norm", "vector_norm", "linalg_vector_norm"}
    | {"var", "std", "var_mean", "std_mean"}
)
# The length of a vector, or a division by it.
LENGTHS = frozenset({"normalize", "norm", "vector_norm", "linalg_vector_norm"})
# Calls that take, or may take, a root.
ROOTS = frozenset(
    {
        "rsqrt",
        "sqrt",
        "norm",
        "vector_norm",
        "linalg_vector_norm",
        "std",
        "std_mean",
        "pow",
        "__pow__",
    }
)
# Calls between the mean of a hand-written norm and its root.
WITHIN_A_NORM = frozenset(
    {
        "add",
        "__add__",
        "sub",
        "__sub__",
        "square",
        "to",
        "float",
        "clamp",
        "clamp_min",
        "maximum",
        "mul",
        "__mul__",
    }
)
# Calls that keep the size of what a norm returns, but for the guard against a division by zero.
KEEP_THE_SIZE = DIVISIONS | {
    "clamp",
    "clamp_min",
    "clamp_min_",
    "maximum",
    "expand_as",
    "to",
    "float",
    "type_as",
    "contiguous",
    "expand",
    "unsqueeze",
}

# -- What a value passes unchanged ----------------------------------------------------------

# Calls that pass a value on: scaled, cast, reshaped, dropped out.
CARRIERS = (
    SCALINGS
    | frozenset(
        {
            "to",
            "float",
            "double",
            "half",
            "bfloat16",
            "type",
            "contiguous",
            "clone",
            "dropout",
            "dropout_",
            "alpha_dropout",
            "identity",
        }
    )
    | {
        "view",
        "reshape",
        "view_as",
        "reshape_as",
        "unflatten",
        "flatten",
        "transpose",
        "permute",
        "T",
        "mT",
        "squeeze",
        "unsqueeze",
    }
)
# The calls among them that change shape or dtype and no number, in eval mode.
SHAPE_ONLY = frozenset(
    {
        "view",
        "reshape",
        "view_as",
        "reshape_as",
        "contiguous",
        "clone",
        "to",
        "float",
        "type",
        "transpose",
        "permute",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "dropout",
        "double",
    }
)
# Calls that put the features in another dimension.
TRANSPOSITIONS = frozenset(
    {
        "transpose",
        "permute",
        "swapaxes",
        "swapdims",
        "movedim",
        "moveaxis",
        "T",
        "mT",
        "adjoint",
    }
)
# Calls after which a parameter's number is another one, so that a gain of 1 is no longer a
# parameter of 1.
CHANGE_A_NUMBER = (
    TIMES
    | ACTIVATIONS
    | DIVISIONS
    | {
        "exp",
        "exp_",
        "log",
        "sqrt",
        "pow",
        "__pow__",
        "square",
        "neg",
        "abs",
        "clamp",
        "softmax",
        "normalize",
        "logsigmoid",
    }
)
# Calls that treat every token by itself, apart from scalings and statistics.
TOKEN_WISE = frozenset(
    {
        "linear",
        "layer_norm",
        "rms_norm",
        "dropout",
        "relu",
        "gelu",
        "silu",
        "tanh",
        "sigmoid",
        "softplus",
        "elu",
        "leaky_relu",
        "mish",
        "relu6",
        "hardswish",
        "erf",
        "exp",
        "square",
        "abs",
        "clamp",
        "where",
        "chunk",
        "split",
        "cat",
        "__getitem__",
        "to",
        "float",
        "type",
        "contiguous",
        "clone",
        "type_as",
        "neg",
        "__neg__",
        "sub",
        "__sub__",
        "add",
        "__add__",
        "__radd__",
        "add_",
        "__iadd__",
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "glu",
        "rsub",
        "__rsub__",
        "addcmul",
        "half",
        "double",
        "bfloat16",
    }
)

# -- Selecting, joining and writing ---------------------------------------------------------

# Table lookups by index.
LOOKUPS = frozenset({"embedding"})
# Calls that pick rows of a weight by an index.
SELECT_ROWS = frozenset({"__getitem__", "index_select", "gather", "take", "take_along_dim"})
# Calls that pick positions of a stream.
SELECT_POSITIONS = frozenset(
    {"__getitem__", "index_select", "gather", "take_along_dim", "narrow", "select"}
)
# Calls that write a value back at positions.
WRITE_POSITIONS = frozenset(
    {
        "__setitem__",
        "index_copy",
        "index_copy_",
        "scatter",
        "scatter_",
        "index_put",
        "index_put_",
    }
)
# Calls that cut a value into pieces.
CUT_INTO_PIECES = frozenset(
    {"chunk", "split", "split_with_sizes", "tensor_split", "unbind", "__getitem__", "narrow"}
)
JOINS = frozenset({"cat", "concat", "concatenate"})

# -- Gradients and values -------------------------------------------------------------------

DETACHES = frozenset({"detach", "detach_"})
# Of their first argument they read the shape or the dtype alone.
METADATA_ONLY = frozenset(
    {
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "rand_like",
        "randn_like",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
        "new_tensor",
    }
)
# Calls through which no gradient passes.
CUTS = (
    DETACHES
    | METADATA_ONLY
    | {"bernoulli", "sign", "argmax", "argmin", "isnan", "isinf", "isfinite"}
)
# Functions whose derivative is zero wherever they have one.
FLAT = frozenset(
    {"sign", "sign_", "sgn", "round", "round_", "floor", "floor_", "ceil", "ceil_"}
) | {"trunc", "trunc_", "fix", "fix_"}
# Of all arguments but the first they read the shape or the dtype alone.
FIRST_ONLY = frozenset({"expand_as", "view_as", "reshape_as", "type_as", "to"})
# Calls that need the numbers of a tensor in Python.
VALUE_QUESTIONS = frozenset(
    {"__bool__", "item", "tolist", "__int__", "__float__", "__index__", "numpy", "equal"}
)
# Calls that ask for a tensor's outline and not for its numbers.
OUTLINE_QUESTIONS = frozenset(
    {
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "is_floating_point",
        "is_complex",
        "element_size",
        "__len__",
        "stride",
        "is_contiguous",
        "storage_offset",
        "data_ptr",
        "__hash__",
        "is_pinned",
        "is_shared",
        "is_inference",
    }
)

# -- Random numbers -------------------------------------------------------------------------

RANDOM_DRAWS = frozenset(
    {
        "dropout",
        "dropout_",
        "rand",
        "randn",
        "randint",
        "randperm",
        "normal",
        "normal_",
        "uniform_",
        "bernoulli",
        "bernoulli_",
        "multinomial",
        "rand_like",
        "randn_like",
        "randint_like",
        "exponential_",
        "gumbel_softmax",
        "alpha_dropout",
        "feature_dropout",
        "rrelu",
        "poisson",
        "random_",
    }
)
# Pieces of the names of calls whose result another run would not repeat.
NAMES_OF_DRAWS = ("rand", "bernoulli", "normal", "multinomial", "empty", "dropout")

# -- In-place operators ---------------------------------------------------------------------

IN_PLACE_OPERATORS = frozenset(
    {
        "__iadd__",
        "__isub__",
        "__imul__",
        "__imatmul__",
        "__itruediv__",
        "__ifloordiv__",
        "__imod__",
        "__ipow__",
        "__iand__",
        "__ior__",
        "__ixor__",
        "__ilshift__",
        "__irshift__",
        "__setitem__",
    }
)
