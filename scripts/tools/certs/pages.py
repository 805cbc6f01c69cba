"""The files that `make_certs` writes for people: a page in each folder, nginx's configuration, and the site files."""

from umbel.site.template import site_toml

CA_PAGE = """\
# The federation's certificate authority

`ca.key` signs the SuperLink's certificate. Who has it can pose as the SuperLink to every site.
Nothing needs it day by day: take this folder off the machine (an encrypted stick, a safe) and delete it here.

It is needed again, as `OUT/ca`, before the SuperLink's certificate expires:

```sh
openssl x509 -enddate -noout -in OUT/centre/superlink.crt
scripts/make_certs OUT --renew        # then restart the SuperLink
```
"""


def centre_page(host: str, port: int) -> str:
    """Return the page of the centre's folder; sites reach the proxy at `host`:`port`."""
    return f"""\
# The centre: SuperLink and ServerApp

In this folder, as a user of its own, in Flower's environment; 1 and 2 under a supervisor that restarts them.
`*.key` and `superexec.secret` never leave it. Why each setting is as it is: docs/security.md.

```sh
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_HOME="$PWD/flwr"

# 1. the SuperLink, for this machine only: whoever reaches all of it can run code at every site
flower-superlink --host 127.0.0.1 --port 8000 --enable-supernode-auth \\
  --ssl-ca-certfile ca.crt --ssl-certfile superlink.crt --ssl-keyfile superlink.key \\
  --isolation process --superexec-auth-secret-file superexec.secret --database superlink.db \\
  --disable-runtime-dependency-installation

# 2. what starts the ServerApps
flower-superexec --runtime-api-address 127.0.0.1:8000 --root-certificates ca.crt \\
  --superexec-auth-secret-file superexec.secret

# 3. once: where `flwr` finds the SuperLink
flwr config list
printf '\\n[superlink.centre]\\naddress = "127.0.0.1:8000"\\nroot-certificates = "%s/ca.crt"\\n' "$PWD" \\
  >> flwr/config.toml

# 4. once per site, while the SuperLink runs: which SuperNodes may connect
flwr supernode register supernodes/SITE.pub centre --name SITE

# 5. a run whose versions and orders are signed, and which takes only what the sites signed
umbel bundle /tmp/umbel-app
flwr run /tmp/umbel-app centre --stream --run-config \\
  "registry=\\"$PWD/registry\\" signing-key=\\"$PWD/signing.key\\" site-keys=\\"$PWD/sites\\""
umbel adapter verify --registry registry --key signing.pub

# 6. what the sites reach, {_address(host, port)}: of the SuperLink only what is for them; under the supervisor, too
nginx -e stderr -p "$PWD" -c nginx.conf
```

`nginx.conf` (Debian: `apt-get install nginx`) has every path relative to this folder, needs no root, and writes nothing
elsewhere. Another proxy does as well, if it lets `/v1/fleet/` through and answers 404 to the rest.
"""


def proxy_file(port: int) -> str:
    """Return an nginx.conf that publishes the Fleet API of the SuperLink on `port`, and no other part of it."""
    return f"""\
# Made by scripts/make_certs. Whoever reaches all of the SuperLink can run code at every site: docs/security.md.
daemon off;
pid nginx.pid;
error_log stderr;
events {{}}
http {{
  access_log off;
  client_body_temp_path nginx-tmp;
  proxy_temp_path nginx-tmp;
  fastcgi_temp_path nginx-tmp;
  uwsgi_temp_path nginx-tmp;
  scgi_temp_path nginx-tmp;
  server {{
    listen {port} ssl;
    ssl_certificate superlink.crt;
    ssl_certificate_key superlink.key;
    ssl_protocols TLSv1.2 TLSv1.3;
    client_max_body_size 16m;            # Flower sends at most 5 MB at a time
    location /v1/fleet/ {{
      proxy_pass https://127.0.0.1:8000/v1/fleet/;    # with the path, so that what is passed on is what was matched
      proxy_http_version 1.1;
      proxy_buffering off;
      proxy_request_buffering off;
      proxy_read_timeout 300s;
      proxy_ssl_verify on;
      proxy_ssl_name localhost;
      proxy_ssl_trusted_certificate ca.crt;
    }}
    location / {{ return 404; }}
  }}
}}
"""


def site_page(site: str, host: str, port: int) -> str:
    """Return the page of a site's folder."""
    return f"""\
# Site {site}: five commands

Keep this folder as it is: mode 0700, `*.key` readable by the site's user only, and nowhere else. The clock must
be right to within five minutes. Fill in `[model].path` and `[training].data` of `site.toml`; then, in this folder:

```sh
umbel check site.toml                     # SGLang's environment
umbel serve site.toml                     # the same; under a supervisor
umbel supernode site.toml --superlink {_address(host, port)} --root-certificates ca.crt \\
  --auth-supernode-private-key supernode.key   # Flower's environment
umbel status site.toml                    # which version answers, since when
umbel rollback site.toml support          # back to what answered before, now
```

The SuperNode connects once the centre has registered `supernode.pub`. It wants a supervisor, too, with
`FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1` and an `FLWR_HOME` of its own. When it ends with
`Exit Code: 305`: `[code: 2001]` it has no key, `[code: 2004]` its key is not registered, or is connected already.
"""


def site_file(site: str) -> str:
    """Return a site file to be filled in, which trusts the centre's key and signs with the site's own."""
    keys = {"site": {"trusted_key": "centre-signing.pub", "signing_key": "updates.key"}}
    comments = {
        "site.trusted_key": "nothing is served, and nothing trained, that the centre did not sign",
        "site.signing_key": "the centre knows this site's updates, hellos and verdicts by its signature",
        "model.path": "the same base model at every site",
        "training.data": "never leaves this machine",
    }
    head = "# Made by scripts/make_certs; docs/reference/configuration.md explains every line. "
    return f"{head}Relative paths start at this folder.\n" + site_toml(
        keys, name=site, data="private/train.jsonl", comments=comments
    )


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
