"""The HTTP interface: routes, access control, request and response bodies."""
