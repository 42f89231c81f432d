import json


class Input:
    def __init__(self, body):
        self._body = body

    def is_empty(self):
        return not self._body

    def get_as_bytes(self):
        return self._body

    def get_as_json(self):
        return json.loads(self._body)
