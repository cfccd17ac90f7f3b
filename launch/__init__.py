"""Starting runs on clusters through submitit. Imports no torch, so that submitting is quick and works on a login node."""
