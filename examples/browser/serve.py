"""Serves a site to browsers on this machine.

python examples/browser/serve.py SITE [PORT]

Any web server does. With the two headers below, browsers let ONNX Runtime use
several threads.
"""

import functools
import http.server
import sys

ISOLATION = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
}


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files, on a page that no other origin shares memory with."""

    extensions_map = {
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def end_headers(self):
        for name, value in ISOLATION.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *arguments):
        pass


def server(folder, port=0):
    """A server of `folder`; port 0 takes any that is free."""
    handler = functools.partial(Handler, directory=str(folder))
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)


if __name__ == "__main__":
    port = int(sys.argv[2]) if len(sys.argv) > 2 else 8000
    print(f"http://127.0.0.1:{port}, until Ctrl+C")
    server(sys.argv[1], port).serve_forever()
