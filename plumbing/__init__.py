"""What surrounds a method and explains none: data, models, the run, its report.

Nobody needs to open this folder to understand an algorithm. It imports neither `common` nor a
script. The large libraries are imported inside the functions that need them, so that `--help` and
a mistyped flag are answered before seconds of imports.
"""
