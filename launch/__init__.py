"""Starting runs on clusters through submitit. Imports no torch: submitting is quick and works on a login node."""
