"""Per-example gradients at Opacus's names. The samplers of torch's layers are all one: the core's rules."""

from privet.opacus.grad_sample.embedding_norm_sample import compute_embedding_norm_sample
from privet.opacus.grad_sample.fast_gradient_clipping import (
    GradSampleHooksFastGradientClipping,
    GradSampleModuleFastGradientClipping,
)
from privet.opacus.grad_sample.grad_sample_module import (
    GradSampleHooks,
    GradSampleModule,
    create_or_accumulate_grad_sample,
)
from privet.opacus.grad_sample.gsm_base import AbstractGradSampleHooks, AbstractGradSampleModule
from privet.opacus.grad_sample.other_modes import (
    GradSampleHooksNoOp,
    GradSampleModuleExpandedWeights,
    GradSampleModuleNoOp,
)
from privet.opacus.grad_sample.samplers import compute_grad_sample as compute_conv_grad_sample
from privet.opacus.grad_sample.samplers import compute_grad_sample as compute_embedding_grad_sample
from privet.opacus.grad_sample.samplers import compute_grad_sample as compute_group_norm_grad_sample
from privet.opacus.grad_sample.samplers import compute_grad_sample as compute_instance_norm_grad_sample
from privet.opacus.grad_sample.samplers import compute_grad_sample as compute_layer_norm_grad_sample
from privet.opacus.grad_sample.samplers import compute_grad_sample as compute_linear_grad_sample
from privet.opacus.grad_sample.samplers import compute_grad_sample as compute_rms_norm_grad_sample
from privet.opacus.grad_sample.samplers import compute_grad_sample as compute_sequence_bias_grad_sample
from privet.opacus.grad_sample.utils import (
    get_gsm_class,
    get_hooks_class,
    prepare_module,
    register_grad_sampler,
    register_norm_sampler,
    wrap_model,
)

__all__ = [
    "AbstractGradSampleHooks",
    "AbstractGradSampleModule",
    "GradSampleHooks",
    "GradSampleHooksFastGradientClipping",
    "GradSampleHooksNoOp",
    "GradSampleModule",
    "GradSampleModuleExpandedWeights",
    "GradSampleModuleFastGradientClipping",
    "GradSampleModuleNoOp",
    "compute_conv_grad_sample",
    "compute_embedding_grad_sample",
    "compute_embedding_norm_sample",
    "compute_group_norm_grad_sample",
    "compute_instance_norm_grad_sample",
    "compute_layer_norm_grad_sample",
    "compute_linear_grad_sample",
    "compute_rms_norm_grad_sample",
    "compute_sequence_bias_grad_sample",
    "create_or_accumulate_grad_sample",
    "get_gsm_class",
    "get_hooks_class",
    "prepare_module",
    "register_grad_sampler",
    "register_norm_sampler",
    "wrap_model",
]
