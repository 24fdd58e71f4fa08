"""A model run one part of a layer at a time: what stays in memory are the hidden states of all tokens."""
