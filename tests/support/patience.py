"""How long tests wait for other processes and browsers: they run on machines that others use as well."""

PATIENCE_S = 600
