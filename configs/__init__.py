"""The presets: one YAML file each. `holimerge.list_presets()` names them."""
