"""The embedded stack: starts, watches and stops every part of Luthier on one machine.

Parts are processes, never imports: `options` reads the command line, `folder` owns DIR, `plan` says
which processes there are, `parts` supervises one process, `stack` runs them all.
"""
