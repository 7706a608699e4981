"""Safety neurons: which MLP neurons alignment changed, and how much of its effect they carry."""

from mechsafety.neurons.agreement import NeuronAgreement, compare_neurons
from mechsafety.neurons.behaviour import Ability, Measured, ReplyLikelihood, ReplyScore, ability, measure
from mechsafety.neurons.contrast import NeuronContrast, contrast_neurons
from mechsafety.neurons.curve import CausalCurve, causal_effect_curve
from mechsafety.neurons.describe import NeuronCards, describe_neurons
from mechsafety.neurons.dynamic import PatchedReplies, dynamic_patching
from mechsafety.neurons.masks import mask_nodes, neuron_mask, random_masks, top_mask
from mechsafety.neurons.runs import greedy_replies
from mechsafety.neurons.scores import NeuronScores, safety_neurons
from mechsafety.neurons.tax import AlignmentTax, alignment_tax

__all__ = [
    "Ability",
    "AlignmentTax",
    "CausalCurve",
    "Measured",
    "NeuronAgreement",
    "NeuronCards",
    "NeuronContrast",
    "NeuronScores",
    "PatchedReplies",
    "ReplyLikelihood",
    "ReplyScore",
    "ability",
    "alignment_tax",
    "causal_effect_curve",
    "compare_neurons",
    "contrast_neurons",
    "describe_neurons",
    "dynamic_patching",
    "greedy_replies",
    "mask_nodes",
    "measure",
    "neuron_mask",
    "random_masks",
    "safety_neurons",
    "top_mask",
]
