"""Decoder layers of captured steps computed by building blocks: which modules match a block, and what a layer then runs."""
