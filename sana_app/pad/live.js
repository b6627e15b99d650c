// The browser's half of the live loop: newest frame wins, one or two requests in flight, late replies dropped.

const MIN_GAP_MS = 30;       // never more than about 33 requests a second, however fast the pen or the server
const RETRY_MS = [300, 600, 1200, 2500, 4000];

async function deflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new CompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function packFrame(seq, frame) {
  const header = new TextEncoder().encode(JSON.stringify({ seq, width: frame.side, height: frame.side, ...frame.settings }));
  const ink = await deflate(frame.ink);
  const body = new Uint8Array(4 + header.length + ink.length);
  new DataView(body.buffer).setUint32(0, header.length);
  body.set(header, 4);
  body.set(ink, 4 + header.length);
  return body;
}

const toBase64 = (bytes) => btoa(Array.from(bytes, (b) => String.fromCharCode(b)).join(""));
const fromBase64 = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

// root: the server's address · appId: of the page's server · server: Gradio's server functions (mint, frame)
// slowMs: above this a picture is asked for when the pen is lifted, not on the way
// snapshot(): the frame to send, now · onPicture(blob, info), onState(state, message) and onStale() tell the pad.
class Live {
  constructor({ root, appId, slowMs, server, snapshot, onPicture, onState, onStale }) {
    Object.assign(this, { root, appId, slowMs, server, snapshot, onPicture, onState, onStale });
    Object.assign(this, { dirty: false, urgent: false, flying: 0, seq: 0, shown: 0, failures: 0, sentAt: -1e9 });
    this.totals = [];       // the last few round trips, ms
    this.modelMs = null;    // of the last picture that was computed: null until there is one
    this.stages = {};       // its stage times
    this.token = null;      // a promise of one
    this.viaServer = false;  // true once the route was refused: the same payload goes through a server function
    this.timer = null;
  }

  // Something changed. `now` = the pen is up, or a setting changed: send it even where live frames are too slow.
  touch(now) {
    this.dirty = true;
    this.urgent = this.urgent || now;
    if (this.urgent || !this.slow) this.onState(this.failures ? "offline" : "busy");
    this.pump();
  }

  get totalMs() {
    const sorted = [...this.totals].sort((a, b) => a - b);
    return sorted.length ? sorted[sorted.length >> 1] : 0;
  }
  get slow() {
    return this.totals.length > 1 && this.totalMs > this.slowMs;
  }
  get mayFly() {  // a second request in flight hides the network only where the network is a good part of the whole
    return this.modelMs !== null && this.totalMs - this.modelMs > this.modelMs / 2 && this.totals.length > 1 ? 2 : 1;
  }

  pump() {
    if (!this.dirty || this.timer || this.flying >= this.mayFly || (this.slow && !this.urgent)) return;
    const wait = this.sentAt + MIN_GAP_MS - performance.now();
    if (wait > 0) return this.later(wait);
    this.dirty = this.urgent = this.refused = false;
    this.sentAt = performance.now();
    this.flying++;
    this.send(++this.seq, this.snapshot()).catch((error) => { console.debug(error); this.failed(); })
      .finally(() => {
        this.flying--;
        this.pump();
        if (!this.flying && !this.dirty && !this.failures && !this.refused) this.onState("idle");
      });
  }

  later(ms) {
    this.timer = setTimeout(() => { this.timer = null; this.pump(); }, ms);
  }

  async send(seq, frame) {
    const start = performance.now();
    const body = await packFrame(seq, frame);
    const token = await this.mint();
    if (!token) {
      if (await this.stale()) this.onStale();
      return this.failed();
    }
    const reply = this.viaServer ? await this.postServer(token, body) : await this.postRoute(token, body);
    if (reply.status === 200) {
      this.failures = 0;
      if (seq <= this.shown) return;
      this.shown = seq;
      if (!reply.header("x-sketch-cached")) {  // a picture made before tells nothing of what the next one will take
        this.stages = JSON.parse(reply.header("x-sketch-stages") || "{}");
        this.modelMs = this.stages.total || 0;
        this.totals.push(performance.now() - start);
        if (this.totals.length > 5) this.totals.shift();
      }
      await this.onPicture(reply.blob, {
        seq, stages: this.stages, modelMs: this.modelMs, totalMs: performance.now() - start,
        notices: JSON.parse(reply.header("x-sketch-notices") || "[]"), frame,
      });
    } else if (reply.status === 401) {        // the server was restarted, or the tab slept long
      this.token = null;
      this.failed();
    } else if ([403, 404, 405].includes(reply.status) && !this.viaServer) {
      this.viaServer = true;                   // the route is not to be had here: a proxy, or a mounted app
      this.again();
    } else if (reply.status >= 500) {
      this.failed(reply.error);
    } else if (reply.status !== 204) {         // 4xx: asking again would not help
      this.failures = 0;
      this.refused = true;
      this.onState("error", reply.error || "The server refused this drawing: " + reply.status);
    }
  }

  mint() {
    this.token ||= Promise.resolve(this.server.mint()).then(
      (answer) => (answer && answer.token) || ((this.token = null), null),
      () => ((this.token = null), null));
    return this.token;
  }

  // No token: is there another server at this address than the one the page came from? Then only a reload helps
  // (its components have other numbers, or it wants a new login).
  async stale() {
    const reply = await fetch(this.root + "/app_id").catch(() => null);
    return Boolean(reply && reply.ok && this.appId && (await reply.json()).app_id !== this.appId);
  }

  async postRoute(token, body) {
    const reply = await fetch(this.root + "/live/frame", {
      method: "POST", body, headers: { "x-sketch-token": token, "content-type": "application/octet-stream" },
    });
    const blob = reply.status === 200 ? await reply.blob() : null;
    const error = reply.status >= 400 ? ((await reply.json().catch(() => ({}))).error || "") : "";
    return { status: reply.status, blob, error, header: (name) => reply.headers.get(name) };
  }

  async postServer(token, body) {
    const reply = await this.server.frame({ token, body: toBase64(body) });
    if (!reply) throw new Error("no answer");
    const blob = reply.jpeg ? new Blob([fromBase64(reply.jpeg)], { type: "image/jpeg" }) : null;
    return { status: reply.status, blob, error: reply.error || "", header: (name) => reply.headers[name] };
  }

  // The frame did not get through. Nothing is lost: the drawing is here, and the newest state goes out again.
  // message: what the server itself said of it, if it said anything.
  failed(message = "") {
    const pause = RETRY_MS[Math.min(this.failures++, RETRY_MS.length - 1)];
    this.onState("offline", message);
    this.dirty = this.urgent = true;
    if (!this.timer) this.later(pause);
  }
  again() {
    this.dirty = this.urgent = true;
  }
}
