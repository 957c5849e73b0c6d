"""What everything on AWS needs: calls with retries, ownership by tags, checks of requests, containers' image and code.

Begin with `calls`. Imports no other room.
"""
