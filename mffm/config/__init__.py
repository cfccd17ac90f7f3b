"""Every schema of mffm, without torch. YAML fills them, an unknown key is an error."""
