"""Tests of gwt_param_groups on the architectures of transformers."""
