"""Where calibration keeps its hidden states."""

from runtime.streaming.hidden import os as os
from runtime.streaming.hidden import token_matrix as token_matrix
