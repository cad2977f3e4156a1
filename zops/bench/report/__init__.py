"""A result as one HTML file: no script, nothing from elsewhere, readable on a phone, in the dark and on paper."""
