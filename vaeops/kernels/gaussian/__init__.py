"""Triton kernels of the Gaussian family: launchers with the arguments of the low-level ops."""

from .log_prob import log_prob_bwd as log_prob_bwd, log_prob_fwd as log_prob_fwd
from .reparam_kl import gaussian_bwd as gaussian_bwd, gaussian_fwd as gaussian_fwd
