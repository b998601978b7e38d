"""gRPC clients under load, run with the Python that has `tritonclient`: serve_grpc_client.py PORT; see serve_clients.Driver.

Each of the clients has a connection of its own. Responses are counted, not parsed.
"""

import json
import struct
import sys
import threading
import time

import grpc
from tritonclient.grpc import service_pb2

LIMIT_S = 600.0
METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
INPUTS = (("max_tokens", "INT32", "<i"), ("end_id", "INT32", "<i"), ("stream", "BOOL", "<?"))


def request(prompt, tokens):
    asked = service_pb2.ModelInferRequest(model_name="mxcompile")
    for (name, kind, layout), value in zip(INPUTS, (tokens, -1, True), strict=True):
        asked.inputs.add(name=name, datatype=kind, shape=[1])
        asked.raw_input_contents.append(struct.pack(layout, value))
    asked.inputs.add(name="input_ids", datatype="INT32", shape=[len(prompt)])
    asked.raw_input_contents.append(struct.pack(f"<{len(prompt)}i", *prompt))
    return asked


def client(port, waiting, tokens, load, failures):
    """Requests from the list until it is empty, one after another."""
    options = [("grpc.use_local_subchannel_pool", 1)]  # else all clients share a connection
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        call = channel.stream_stream(METHOD, service_pb2.ModelInferRequest.SerializeToString, lambda data: data)
        while True:
            try:
                prompt = waiting.pop(0)
            except IndexError:
                return
            start = last = time.perf_counter()
            seen = 0
            for data in call(iter([request(prompt, tokens)]), timeout=LIMIT_S):
                now = time.perf_counter()
                (load["between"] if seen else load["first"]).append(now - last)
                last, seen, text = now, seen + 1, data
            if seen != tokens:
                failures.append(f"{seen} of {tokens} tokens came: {text[:300]!r}")
                return
            load["whole"].append(last - start)
            load["tokens"] += seen


def main():
    for line in sys.stdin:
        asked = json.loads(line)
        load = {"wall": 0.0, "tokens": 0, "first": [], "between": [], "whole": []}
        waiting, failures = list(asked["prompts"]), []
        arguments = (sys.argv[1], waiting, asked["tokens"], load, failures)
        threads = [threading.Thread(target=client, args=arguments) for _ in range(asked["clients"])]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        load["wall"] = time.perf_counter() - start
        if failures:
            sys.exit(failures[0])
        print(json.dumps(load), flush=True)


main()
