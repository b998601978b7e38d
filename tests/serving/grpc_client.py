"""gRPC clients, run with the Python that has `tritonclient`: grpc_client.py PORT < requests.json > results.json

All requests run at once, each over its own stream. A request is {"inputs": {...}, "leave_after": responses or null};
its result {"responses": [{...}], "error": text or null}.
"""

import json
import queue
import sys
import threading

import numpy as np
import tritonclient.grpc as triton

TYPES = {
    "text_input": ("BYTES", np.object_),
    "stop_words": ("BYTES", np.object_),
    "session_id": ("BYTES", np.object_),
    "input_ids": ("INT32", np.int32),
    "max_tokens": ("INT32", np.int32),
    "top_k": ("INT32", np.int32),
    "end_id": ("INT32", np.int32),
    "temperature": ("FP32", np.float32),
    "top_p": ("FP32", np.float32),
    "repetition_penalty": ("FP32", np.float32),
    "seed": ("UINT64", np.uint64),
    "stream": ("BOOL", np.bool_),
    "session_start": ("BOOL", np.bool_),
    "return_log_probs": ("BOOL", np.bool_),
}


def ask(port, request, results, index):
    responses, error, answers = [], None, queue.Queue()
    inputs = []
    for name, value in request["inputs"].items():
        values = value if isinstance(value, list) else [value]
        kind, dtype = TYPES[name]
        array = np.array([v.encode() if isinstance(v, str) else v for v in values], dtype)
        inputs.append(triton.InferInput(name, list(array.shape), kind))
        inputs[-1].set_data_from_numpy(array)
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        client.start_stream(callback=lambda result, error: answers.put((result, error)))
        client.async_stream_infer("mxcompile", inputs, enable_empty_final_response=True)
        while len(responses) != request.get("leave_after"):
            result, problem = answers.get(timeout=120)
            if problem is not None:
                error = problem.message()
                break
            response = result.get_response()
            values = {out.name: result.as_numpy(out.name) for out in response.outputs}
            if values:
                responses.append(
                    {k: [v.decode() if isinstance(v, bytes) else v for v in a.tolist()] for k, a in values.items()}
                )
            if response.parameters["triton_final_response"].bool_param:
                break
        client.stop_stream(cancel_requests=True)
    results[index] = {"responses": responses, "error": error}


requests = json.load(sys.stdin)
results = [None] * len(requests)
threads = [threading.Thread(target=ask, args=(sys.argv[1], r, results, i)) for i, r in enumerate(requests)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
json.dump(results, sys.stdout)
