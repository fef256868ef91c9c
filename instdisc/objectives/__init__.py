"""Objectives of instance discrimination: functions from features to a scalar, in float32 and log space."""

from instdisc.objectives.infonce import infonce_loss
from instdisc.objectives.nce import nce_loss
from instdisc.objectives.softmax import softmax_loss

__all__ = ["infonce_loss", "nce_loss", "softmax_loss"]
