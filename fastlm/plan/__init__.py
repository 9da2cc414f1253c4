"""What training would take on so many GPUs: every figure here is arithmetic.

cards.py: what a GPU has. work.py: what is trained, and how it is shared out. memory.py: bytes in
each GPU. step.py: seconds of a step, computing and communicating. duration.py: a whole run, with
its checkpoints, failures and energy. command.py: the tables. docs/scaling.md says what each formula
assumes, and which of them were held against a measurement.
"""
