"""Images behind the real server: the answers of the engine alone, and one clear error for what is no image."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from pictures import base64_of, data_url, encoded, part, picture, png_head
from served import LIMIT_S
from test_triton import over_grpc

from mxcompile.chat import render
from mxcompile.guides import Guide

openai = pytest.importorskip("openai")
A, B, C = encoded(picture(60, 40, 1)), encoded(picture(50, 100, 2), "WEBP"), encoded(picture(28, 28, 3), "JPEG")
TEXT = {"type": "text", "text": "What is different?"}


@pytest.fixture(scope="module")
def client(vl_server):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{vl_server.openai}/v1", api_key="none", max_retries=0) as made:
        yield made


def chat(client, messages, **options):
    asked = dict(model="mxcompile", messages=messages, temperature=0, max_tokens=8) | options
    return client.chat.completions.create(**asked)


def user(*parts):
    return {"role": "user", "content": list(parts)}


def said(text):
    return {"role": "user", "content": text}


def test_chats_about_images_equal_a_single_run(client, vl_loaded):
    """Images before, between and after texts, in several formats and turns; the second turn finds the first one's state."""
    first = user(part(A), TEXT, part(B, "image/webp", detail="high"))
    text = "<image>What is different?<image>"
    expected = vl_loaded.generate(render([said(text)]), images=[A, B], max_new_tokens=8)
    answer = chat(client, [first])
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == expected.prompt_tokens > 200, "the images' tokens count"
    pieces = chat(client, [first], stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected.text
    told = {"role": "assistant", "content": "Much."}
    second = user(
        {"type": "text", "text": "And to "}, part(C, "image/jpg", detail="auto"), {"type": "text", "text": "?"}
    )
    plain = [said(text), told, said("And to <image>?")]
    expected = vl_loaded.generate(render(plain), images=[A, B, C], max_new_tokens=8)
    answer = chat(client, [first, told, second])
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens >= 192, "also what lies within and behind images"


def test_the_same_text_about_another_image_is_read_anew(client, vl_loaded):
    """Same text, same size, hence the very same tokens."""
    one, other = encoded(picture(60, 40, 11)), encoded(picture(60, 40, 12))
    found = []
    for data in (one, other, one):
        answer = chat(client, [user(part(data), TEXT)], max_tokens=12)
        alone = vl_loaded.generate(render([said("<image>What is different?")]), images=[data], max_new_tokens=12)
        assert answer.choices[0].message.content == alone.text
        found.append((alone.text, answer.usage.prompt_tokens_details.cached_tokens))
    assert found[0][0] != found[1][0], "else nothing is proved"
    # What is common to both comes before the image, and is shorter than a chunk.
    assert [cached for _, cached in found] == [0, 0, (alone.prompt_tokens - 1) // 32 * 32]


def test_several_answers_about_one_image(client, vl_loaded):
    settings = dict(temperature=0.8, seed=7)
    answer = chat(client, [user(part(C, "image/jpeg"))], n=3, **settings, extra_body={"top_k": 5})
    for choice in answer.choices:
        expected = vl_loaded.generate(
            render([said("<image>")]), images=[C], max_new_tokens=8, temperature=0.8, top_k=5, seed=7 + choice.index
        )
        assert choice.message.content == expected.text


def test_an_answer_about_an_image_follows_a_guide(client, vl_loaded):
    regex = "[a-c]{3}-[0-9]{2}"
    expected = vl_loaded.generate(render([said("<image>")]), images=[A], guide=Guide("regex", regex), max_new_tokens=20)
    answer = chat(client, [user(part(A))], max_tokens=20, extra_body={"structured_outputs": {"regex": regex}})
    assert answer.choices[0].message.content == expected.text
    assert re.fullmatch(regex, expected.text)


def test_clients_with_and_without_images_beside_each_other(vl_server, installation, vl_loaded):
    """Over HTTP in base64, over gRPC as bytes."""
    bodies = []
    for index in range(12):
        shown = [[], [A], [encoded(picture(30 + 9 * index, 50, index))], [C, B]][index % 4]
        text = "".join(["<image>"] * len(shown)) + " layers remember" * (1 + index)
        bodies.append(({"text_input": text, "max_tokens": 4 + index, "client_id": str(index % 3)}, shown))
    in_json = [body | ({"images": [base64_of(data) for data in shown]} if shown else {}) for body, shown in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        over_http = list(pool.map(lambda body: vl_server.generate(body, stream=bool(len(body) % 2)), in_json))
    as_bytes = [
        {"inputs": body | ({"images": [base64_of(data) for data in shown]} if shown else {}), "decode": ["images"]}
        for body, shown in bodies
    ]
    for (body, shown), http, grpc in zip(bodies, over_http, over_grpc(vl_server, installation, as_bytes), strict=True):
        expected = vl_loaded.generate([body["text_input"]], images=[shown], max_new_tokens=body["max_tokens"])[0]
        assert http["output_ids"] == expected.tokens
        assert http["num_input_tokens"] == expected.prompt_tokens
        assert grpc["error"] is None
        assert [token for response in grpc["responses"] for token in response["output_ids"]] == expected.tokens


def test_equals_the_command_line(vl_server, vl_engine, tmp_path):
    (tmp_path / "a.png").write_bytes(A)
    options = f"--image {tmp_path / 'a.png'} --max-new-tokens 12 --threads 1 --json --prompt".split()
    command = [sys.executable, "-m", "mxcompile", "run", vl_engine, *options, "See <image>?"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    body = {"text_input": "See <image>?", "images": base64_of(A), "max_tokens": 12}
    assert vl_server.generate(body, stream=False)["output_ids"] == json.loads(done.stdout)["tokens"]


def test_a_session_goes_on_behind_and_with_images(vl_server, vl_loaded):
    """What a session keeps unfed moves the places of the next image."""
    ids, shown = [], []
    for turn, (text, images) in enumerate((("One <image>", [A]), ("two", []), ("<image> and <image>", [C, A]))):
        body = {"text_input": text, "max_tokens": 5, "end_id": -1, "images": [base64_of(data) for data in images]}
        found = vl_server.generate(body | {"session_id": "album", "session_start": turn == 0}, stream=False)
        ids, shown = [*ids, *vl_loaded.tokens(text)], [*shown, *images]
        expected = vl_loaded.generate([ids], images=[shown], max_new_tokens=5, stop_token_ids=())[0]
        assert found["output_ids"] == expected.tokens
        ids += expected.tokens
        assert vl_loaded.config.vision.image_token_id not in expected.tokens, "else the run alone takes it for an image"


# --- What is refused -------------------------------------------------------------------------------------------------


def image_url(url, **more):
    return [user({"type": "image_url", "image_url": {"url": url} | more})]


CUT = base64_of(A)[:-3]
MANY = [user(*[part(C)] * 17)]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            image_url("https://example.com/a.png?key=secret"),
            "https: URLs are not followed; this server fetches nothing",
        ),
        (image_url("http://169.254.169.254/latest"), "http: URLs are not followed"),
        (image_url("file:///etc/passwd"), "file: URLs are not followed"),
        (image_url("a.png"), "this is no URL; this server fetches nothing"),
        (image_url("data:image/gif;base64,R0lGODlhAQABAAAAACw="), "must be one of image/png, image/jpeg, image/webp"),
        (image_url("data:text/plain;base64,aGVsbG8="), "must be one of image/png"),
        (image_url("data:image/png,plain"), "must hold base64"),
        (image_url("data:image/png;base64,"), "the image is empty"),
        (image_url(f"data:image/png;base64,{CUT}"), "is not valid base64"),
        (image_url("data:image/png;base64,@@@@"), "is not valid base64"),
        (image_url(data_url(A), detail="low"), '.detail: only "auto" and "high"'),
        (image_url(data_url(A), size="x"), "image_url.size: not supported here"),
        ([user({"type": "image_url", "image_url": data_url(A)})], 'image_url: must be {"url"'),
        ([user({"type": "input_audio", "input_audio": {}})], "messages.0.content.0: must be a text or an image_url"),
        ([{"role": "system", "content": [part(A)]}], "messages.0.content.0: only messages of the user may have images"),
        (MANY, "17 were given; a request may have 16 at most"),
        ([user(part(A), {"type": "text", "text": "<image>"})], "2 <image> marks for 1 image"),
        ([said("<image>")], "1 <image> mark for no images"),
        (image_url(data_url(b"hello")), "images.0: is not a PNG, JPEG or WebP image"),
        (image_url(data_url(encoded(picture(9, 9), "GIF"))), "images.0: is not a PNG, JPEG or WebP image"),
        (image_url(data_url(A[: len(A) // 2])), "images.0: the image is damaged"),
        (image_url(data_url(png_head(0, 7))), "images.0: "),
        (image_url(data_url(png_head(100_000, 100_000))), "images.0: has far more pixels; images may have"),
        (image_url(data_url(png_head(9_000, 9_000))), "images.0: has 9000 x 9000 pixels; images may have"),
        (image_url(data_url(png_head(20_000, 10))), "20000 x 10 pixels is too narrow"),
        ([user(*[part(encoded(picture(170, 160)))] * 3)], "but the engine holds at most 640"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_image_is_told(client, messages, message, stream):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, messages, stream=stream)
    assert message in refused.value.body["message"]
    assert "secret" not in refused.value.body["message"]
    assert refused.value.body["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"text_input": "no mark", "images": base64_of(C)}, "no <image> marks for 1 image"),
        ({"text_input": "<image>", "images": CUT}, "images.0: is not valid base64"),
        ({"text_input": "<image>", "images": "é"}, "images.0: is not valid base64"),
        ({"text_input": "<image>", "images": ""}, "images.0: is not a PNG, JPEG or WebP image"),
        ({"text_input": "<image>", "images": "A" * (23 << 20)}, "those of a request may have 16777216 at most"),
        (
            {"text_input": "<image>", "images": base64_of(C), "prompt_log_probs": True, "top_log_probs": 1},
            "the tokens of an image have no log-probabilities",
        ),
    ],
)
def test_triton_clients_are_told_too(vl_server, body, message):
    status, answer = vl_server.post("generate", body)
    assert status == 400
    assert message in answer["error"]


def test_engines_without_a_vision_half_say_so(server):
    with (
        openai.OpenAI(base_url=f"http://127.0.0.1:{server.openai}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.BadRequestError, match="takes no images; it reads text only"),
    ):
        chat(client, [user(TEXT, part(A))])
    status, answer = server.post("generate", {"text_input": "a", "images": base64_of(A)})
    assert (status, "this engine takes no images: it has no vision half" in answer["error"]) == (400, True)
    assert server.generate({"text_input": "<image>", "max_tokens": 1}, stream=False)["num_input_tokens"] > 1, "letters"


def test_clients_that_leave_free_their_slots(vl_server, vl_loaded):
    body = {"text_input": "<image>" * 4, "images": [base64_of(A)] * 4, "max_tokens": 300, "stream": True}
    for index in range(12):
        connection, response = vl_server.open("generate_stream", body | {"text_input": str(index) + "<image>" * 4})
        if index % 2:
            response.readline()
        response.close()
        connection.close()
    vl_server.wait_idle()
    body = {"text_input": "<image>", "images": base64_of(A), "max_tokens": 4}
    expected = vl_loaded.generate("<image>", images=[A], max_new_tokens=4)
    assert vl_server.generate(body, stream=False)["output_ids"] == expected.tokens


def test_nothing_of_an_image_is_logged(vl_server, client):
    data = encoded(picture(40, 40, 77))
    chat(client, [user(part(data))], extra_headers={"X-Request-Id": "seen"})
    for broken in (data[:300], data[20:]):
        with pytest.raises(openai.BadRequestError):
            chat(client, [user(part(broken))], extra_headers={"X-Request-Id": "broken"})
    vl_server.wait_logged('"request_id": "seen", "path": "/v1/chat/completions", "status": 200')
    vl_server.wait_logged('"request_id": "broken"')
    log = vl_server.log.read_text()
    text = base64_of(data)
    assert not any(text[at : at + 16] in log for at in range(0, len(text) - 16, 16))
    assert "base64," not in log
    assert base64.b64encode(data[:30]).decode()[:12] not in log
