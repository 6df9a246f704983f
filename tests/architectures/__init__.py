"""What gwt_param_groups does with the architectures of transformers."""
