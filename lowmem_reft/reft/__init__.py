"""⟨Φ, P, L⟩ of arXiv 2404.03592: what is edited, where, in which layers, as a PEFT method."""
