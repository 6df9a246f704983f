"""Models from presets and configuration files, on the meta device."""
