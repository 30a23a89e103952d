"""Helpers of the plugin's tests serve these too."""
