"""Names of tensor operations by what they do with channels; whatever is not listed is not followed."""


def _names(*lines: str) -> frozenset[str]:
    return frozenset(name for line in lines for name in line.split())


MOVES = _names(  # entries change place and nothing else
    "view reshape flatten unflatten permute transpose movedim swapaxes swapdims t squeeze unsqueeze contiguous clone",
    "detach expand expand_as view_as cat concat concatenate stack pixel_shuffle pixel_unshuffle channel_shuffle",
    "native_channel_shuffle flip roll repeat tile",
)
COPIES = _names("to float double type_as zeros_like ones_like")  # the result has its argument's shape
FRESH = _names("new_zeros new_ones new_empty new_full new_tensor")  # the result has a size of its own
PIECES = _names("chunk split tensor_split split_with_sizes unbind narrow select __getitem__")
ELEMENTWISE = _names(
    "add radd iadd sub rsub isub subtract mul rmul imul multiply div divide true_divide truediv rtruediv itruediv",
    "rdiv idiv pow ipow neg square sqrt rsqrt exp log abs sign reciprocal maximum minimum max min where lerp addcmul",
    "addcdiv masked_fill round floor ceil erf sin cos clamp clip clamp_min clamp_max relu relu6 gelu silu hardswish",
    "hardsigmoid hardtanh elu leaky_relu selu mish softplus celu tanh sigmoid logsigmoid softsign tanhshrink",
    "hardshrink softshrink threshold rrelu dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout",
)
REDUCTIONS = _names("mean sum amax amin max min prod logsumexp softmax log_softmax var std cumsum argmax argmin")
SPATIAL = _names("interpolate upsample pad")  # beside everything that pools
SILENT = _names(  # they tell of a tensor and make none
    "size dim numel stride __get__ __len__ is_contiguous type device get_device ndimension is_floating_point",
    "is_complex __hash__ __repr__ item tolist _assert",
)
ATTENTION = _names("scaled_dot_product_attention multi_head_attention_forward matmul bmm baddbmm einsum")
CONVOLUTION_CALLS = _names("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
NORM_CALLS = _names("batch_norm instance_norm group_norm layer_norm prelu")
