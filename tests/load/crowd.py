"""Clients in a process of their own, so that they take nothing from the server but requests.

Reads one JSON object from stdin: url, seconds, clients, pause (seconds after a refusal), and `asked`, a list of bodies
with the text and the number of tokens that each has alone. Each client asks again and again until the time is over.
Writes one JSON object: how many answers, refusals and tokens there were, and up to ten faults, which are errors other
than 429 and answers that differ.
"""

import json
import random
import sys
import threading
import time

from gorgon.bench.load_client import HttpTransport, send


def main():
    """Runs the clients."""
    given = json.load(sys.stdin)
    found = {"answers": 0, "refusals": 0, "tokens": 0, "faults": []}
    lock, end = threading.Lock(), time.monotonic() + given["seconds"]

    def client(number):
        chance = random.Random(number)
        transport = HttpTransport(given["url"], "openai", None, 60)
        while time.monotonic() < end:
            asked = chance.choice(given["asked"])
            outcome = send(transport, asked["body"], 0, 0.0)
            with lock:
                if outcome.error == "429":
                    found["refusals"] += 1
                elif outcome.error or (outcome.text, outcome.tokens) != (asked["text"], asked["tokens"]):
                    found["faults"].append(
                        [outcome.error, outcome.text, outcome.tokens, asked["text"], asked["tokens"]]
                    )
                else:
                    found["answers"] += 1
                    found["tokens"] += outcome.tokens
            if outcome.error == "429":
                time.sleep(given["pause"])
        transport.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(given["clients"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found["faults"] = found["faults"][:10]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
