"""Plugins that put the hook into other engines, without a patch of those."""
