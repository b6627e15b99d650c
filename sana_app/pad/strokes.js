// The drawing as a list of strokes, and its two rasters: the page one looks at and the ink that is sent.
// Strokes live on a 512 x 512 page whatever the screen; undo, redo, eraser, mirror and clear never need the server.

const PAGE = 512;

// One history of operations: {kind: "stroke", stroke} | {kind: "clear"} | {kind: "load", strokes}.
// "clear" and "load" start a fresh page, and are undone like a stroke.
class Sketch {
  constructor(ops = []) {
    this.ops = ops;
    this.undone = [];
  }
  get strokes() {
    let start = this.ops.length;
    while (start > 0 && this.ops[start - 1].kind === "stroke") start--;
    const floor = start > 0 && this.ops[start - 1].kind === "load" ? this.ops[start - 1].strokes : [];
    return floor.concat(this.ops.slice(start).map((op) => op.stroke));
  }
  do(op) {
    this.ops.push(op);
    this.undone = [];
  }
  undo() {
    if (this.ops.length) this.undone.push(this.ops.pop());
  }
  redo() {
    if (this.undone.length) this.ops.push(this.undone.pop());
  }
}

// A stroke is {size, erase, mirror, points: [[x, y] or [x, y, pressure], ...]} in page units.
function paintStroke(ctx, stroke) {
  ctx.save();
  ctx.lineCap = ctx.lineJoin = "round";
  ctx.strokeStyle = ctx.fillStyle = "#000";
  ctx.globalCompositeOperation = stroke.erase ? "destination-out" : "source-over";
  paintPoints(ctx, stroke.points, stroke.size);
  if (stroke.mirror) {
    paintPoints(ctx, stroke.points.map(([x, y, p]) => [PAGE - x, y, p]), stroke.size);
  }
  ctx.restore();
}

function paintPoints(ctx, points, size) {
  const [x0, y0, p0] = points[0];
  if (points.length === 1) {
    ctx.beginPath();
    ctx.arc(x0, y0, (size * penWidth(p0)) / 2, 0, 2 * Math.PI);
    ctx.fill();
  } else if (p0 === undefined) {
    ctx.lineWidth = size;
    ctx.beginPath();
    ctx.moveTo(x0, y0);
    for (let i = 1; i < points.length - 1; i++) {  // smooth: curves from midpoint to midpoint
      const [x, y] = points[i], [nx, ny] = points[i + 1];
      ctx.quadraticCurveTo(x, y, (x + nx) / 2, (y + ny) / 2);
    }
    ctx.lineTo(...points[points.length - 1].slice(0, 2));
    ctx.stroke();
  } else {
    for (let i = 1; i < points.length; i++) {  // a pressed line changes its width on the way
      ctx.lineWidth = (size * (penWidth(points[i - 1][2]) + penWidth(points[i][2]))) / 2;
      ctx.beginPath();
      ctx.moveTo(points[i - 1][0], points[i - 1][1]);
      ctx.lineTo(points[i][0], points[i][1]);
      ctx.stroke();
    }
  }
}

const penWidth = (pressure) => (pressure === undefined ? 1 : 0.4 + 1.2 * pressure);

// A square canvas that shows a sketch. Finished strokes are kept on a base layer; the stroke in progress is drawn
// over it, from its first point each time, so that what is shown live is to the pixel what is kept.
class Raster {
  constructor(canvas, side, readable) {
    this.canvas = canvas;
    this.base = document.createElement("canvas");
    this.contexts = [canvas, this.base].map((c) => c.getContext("2d", { willReadFrequently: readable }));
    this.resize(side);
  }
  resize(side) {
    this.side = this.canvas.width = this.canvas.height = this.base.width = this.base.height = side;
    for (const ctx of this.contexts) ctx.setTransform(side / PAGE, 0, 0, side / PAGE, 0, 0);
  }
  rebuild(strokes) {
    this.contexts[1].clearRect(0, 0, PAGE, PAGE);
    for (const stroke of strokes) paintStroke(this.contexts[1], stroke);
    this.show(null);
  }
  commit(stroke) {
    paintStroke(this.contexts[1], stroke);
    this.show(null);
  }
  show(current) {
    this.contexts[0].clearRect(0, 0, PAGE, PAGE);
    this.contexts[0].drawImage(this.base, 0, 0, PAGE, PAGE);
    if (current) paintStroke(this.contexts[0], current);
  }
  ink() {  // one byte a pixel, 255 = ink
    const rgba = this.contexts[0].getImageData(0, 0, this.side, this.side).data;
    const ink = new Uint8Array(this.side * this.side);
    for (let i = 0; i < ink.length; i++) ink[i] = rgba[4 * i + 3];
    return ink;
  }
}
