"""How convolutions, pools and sums over images are lowered on each platform."""

from fzoo.ops.convolution import (
    CPU_FORMS,
    Form,
    by_groups,
    columns,
    conv_general_dilated,
    cpu_form,
    depthwise_shifted,
    is_depthwise,
    is_grouped,
    is_narrow,
    is_pointwise,
    is_small_stem,
    is_winograd,
    pointwise,
    row_columns,
    winograd,
)
from fzoo.ops.pooling import Pool, pool
from fzoo.ops.reductions import beside, channel_mean, spread
from fzoo.ops.shapes import Convolution, product, windows
from fzoo.ops.winograd import (
    minimal_filtering,
    winograd_kernel,
    winograd_products,
    winograd_tile,
    winograd_transformed,
)

__all__ = [
    "CPU_FORMS",
    "Convolution",
    "Form",
    "Pool",
    "beside",
    "by_groups",
    "channel_mean",
    "columns",
    "conv_general_dilated",
    "cpu_form",
    "depthwise_shifted",
    "is_depthwise",
    "is_grouped",
    "is_narrow",
    "is_pointwise",
    "is_small_stem",
    "is_winograd",
    "minimal_filtering",
    "pointwise",
    "pool",
    "product",
    "row_columns",
    "spread",
    "windows",
    "winograd",
    "winograd_kernel",
    "winograd_products",
    "winograd_tile",
    "winograd_transformed",
]
