"""Names that arguments choose from, of tables that need PyTorch or triton.

Written out here as those tables cannot be imported for help alone; tests/test_light_start.py holds both equal.
"""

# of `kernels.registry`
OPS = (
    "cross_entropy", "excite_norm_act_add", "newton_schulz", "muon", "norm_act", "pool_norm_act", "se_gate",
    "sgd_nesterov", "squeeze_excite", "whiten", "whiten_project_norm_act",
)  # fmt: skip
# of `kernels.examine`
MODELS = (
    "efficientnet_b0", "efficientnet_v2_s", "mobilenet_v3_large", "mobilenet_v3_small", "regnet_y_400mf", "resnet50",
)  # fmt: skip
PROVIDERS = ("fused", "eager", "compile", "torchvision", "optim-foreach", "optim-fused", "optim-muon")
TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
GPUS = ("A100", "H100", "H200", "4090", "5090")
