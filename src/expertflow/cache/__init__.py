"""Decide what to keep in the slots, without torch: tables, policies, strategies, controller."""
