"""How the pages and the pictures look. Light and dark by the reader's own setting; fonts that every system has."""

_LIGHT = """--paper:#fdfdfb;--ink:#1c1c1a;--quiet:#66655f;--rule:#e2e0d8;--edge:#c9c6bb;--wash:#f5f4ef;
--good:#1b7346;--bad:#b3261e;--s0:#1f5fa8;--s1:#b55a0a;--s2:#6a4c93;--s3:#1b7346;--s4:#66655f;
--p0:#4f7cae;--p1:#a9c0d9;--p2:#dcd8cb;--p3:#c9c6bb;"""
_DARK = """--paper:#161615;--ink:#e9e7e1;--quiet:#a3a199;--rule:#31302c;--edge:#504e47;--wash:#1f1f1d;
--good:#63c590;--bad:#ff8f85;--s0:#82b4ee;--s1:#f0a860;--s2:#bca4e4;--s3:#63c590;--s4:#a3a199;
--p0:#6f9fd3;--p1:#46698f;--p2:#4a4841;--p3:#5d5a52;"""
_COLOURS = f":root{{{_LIGHT}}}\n@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}\n"

# Of every picture, in a page or alone.
PLOT = """.t{font:11px ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--ink);
font-variant-numeric:tabular-nums;paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}
.quiet{fill:var(--quiet)}.t.good{fill:var(--ink)}.t.bad{fill:var(--bad);font-weight:600}.n{fill:var(--quiet)}
.rule{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--edge);stroke-width:1}
.mark{stroke:var(--quiet);stroke-width:1;stroke-dasharray:2 3}.limit{stroke:var(--ink);stroke-dasharray:none}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.s0{stroke:var(--s0)}.s1{stroke:var(--s1);stroke-dasharray:7 4}.s2{stroke:var(--s2);stroke-dasharray:1.5 4}
.s3{stroke:var(--s3);stroke-dasharray:9 3 2 3}.s4{stroke:var(--s4)}
.bar{fill:var(--p0)}.bar.p1{fill:var(--p1)}.bar.p2{fill:var(--p2)}.bar.p3{fill:var(--p3)}
.bar.good{fill:var(--good)}.bar.bad{fill:var(--bad)}.spread{stroke:var(--ink);stroke-width:1.2}
.dot{fill:var(--s0);stroke:var(--paper);stroke-width:1.5}.dot.bad{fill:var(--paper);stroke:var(--bad);stroke-width:1.6}
.dot.best{fill:var(--good)}.front{fill:none;stroke:var(--good);stroke-width:1.2;stroke-dasharray:4 3}
.lead-line{stroke:var(--edge);stroke-width:1}.best-name{font-weight:600}
"""

_PAGE = """*{box-sizing:border-box}
html{background:var(--paper);color:var(--ink);-webkit-text-size-adjust:100%}
body{margin:0;font:16px/1.55 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main,footer{max-width:64rem;margin:0 auto;padding:0 1.5rem}
header{padding:3.5rem 0 1rem}
h1{font-size:clamp(1.5rem,4.5vw,2.25rem);line-height:1.15;letter-spacing:-.015em;font-weight:650;margin:0 0 1rem;
overflow-wrap:anywhere}
h2{font-size:1.2rem;line-height:1.3;font-weight:650;letter-spacing:-.005em;margin:0 0 .9rem}
p{max-width:44rem;margin:0 0 1rem;overflow-wrap:break-word}
.kind{margin:0 0 .35rem;color:var(--quiet);font-size:.95rem}
.verdict{display:inline-block;margin:0 0 1rem;padding:.1rem .7rem;border:1.5px solid;border-radius:2rem;font-weight:650;
font-size:.95rem}
.lead{font-size:1.15rem;line-height:1.5;max-width:46rem;margin:0 0 1.75rem}
.good{color:var(--good)}.bad{color:var(--bad)}.none{color:var(--quiet)}
td.good,td.bad{font-weight:600;white-space:nowrap}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.7rem,1fr));gap:1.1rem 1rem;margin:0 0 1.75rem;
padding:1.1rem 0;border-top:1px solid var(--edge);border-bottom:1px solid var(--edge)}
.facts div{min-width:0}.facts dt{color:var(--quiet);font-size:.82rem;line-height:1.3}
.facts dd{margin:.15rem 0 0;font-size:1.4rem;line-height:1.25;font-weight:600;font-variant-numeric:tabular-nums;
letter-spacing:-.01em}
.facts small{display:block;font-size:.8rem;line-height:1.35;font-weight:400;color:var(--quiet);letter-spacing:0}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:.15rem 1.1rem;padding:0;margin:0;font-size:.88rem}
a{color:var(--s0);text-decoration:none}a:hover{text-decoration:underline}
:focus-visible{outline:2px solid var(--s0);outline-offset:2px}
section{padding:1.9rem 0 .6rem;border-top:1px solid var(--rule);scroll-margin-top:1rem}
.scroll{overflow-x:auto;margin:0 0 1.4rem}
table{border-collapse:collapse;font-size:.86rem;line-height:1.4;font-variant-numeric:tabular-nums;
min-width:min(100%,34rem)}
caption{text-align:left;color:var(--quiet);padding:0 0 .4rem;font-size:.84rem}
th,td{text-align:left;vertical-align:top;padding:.36rem 1.1rem .36rem 0;border-bottom:1px solid var(--rule);
font-weight:400}
th:last-child,td:last-child{padding-right:0}
thead th,thead td{color:var(--quiet);border-bottom:1px solid var(--edge);vertical-align:bottom;font-size:.8rem;
line-height:1.3}
thead .n{white-space:normal}tbody th{min-width:9rem;max-width:30rem;overflow-wrap:break-word}
.wide th,.wide td{padding-right:.75rem}table.wide{font-size:.82rem}
.n{text-align:right;white-space:nowrap}
.strong{font-weight:600}th.part{padding-left:1rem;color:var(--quiet)}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.86em;overflow-wrap:anywhere}
pre{background:var(--wash);padding:.8rem 1rem;border-radius:4px;overflow-x:auto;white-space:pre-wrap;margin:0 0 1.2rem}
.note{color:var(--quiet);font-size:.84rem;margin-top:-.9rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1.5rem 2.5rem;
margin:.6rem 0 1.2rem}
figure{margin:0;min-width:0;max-width:29rem}figure.wide{max-width:32rem}
figcaption{color:var(--quiet);font-size:.84rem;line-height:1.45;margin-top:.4rem}figcaption b{color:var(--ink);
font-weight:600}
svg.plot{display:block;width:100%;height:auto;overflow:visible}
figure.scatter{max-width:46rem;overflow-x:auto}
footer{padding-top:1.2rem;padding-bottom:3rem;color:var(--quiet);font-size:.84rem}
footer p{border-top:1px solid var(--edge);padding-top:.9rem;max-width:none}
@media (max-width:40rem){tbody th{min-width:7.5rem}
.scatter svg{min-width:34rem}.gates thead,.gates td:last-child{display:none}
.gates,.gates tbody{display:block;min-width:0}
.gates tr{display:flex;flex-wrap:wrap;gap:0 .5rem;padding:.45rem 0;border-bottom:1px solid var(--rule)}
.gates td{border:0;padding:0}.gates td:nth-child(1){width:5rem}.gates td:nth-child(2){width:calc(100% - 5.5rem)}
.gates td:nth-child(3){margin-left:5.5rem;font-weight:600}.gates td:nth-child(4){color:var(--quiet)}
.gates td:nth-child(4)::before{content:"has to be "}
main,footer{padding-left:1.1rem;padding-right:1.1rem}header{padding-top:1.75rem}
.lead{font-size:1.05rem}.facts{grid-template-columns:1fr 1fr}.facts dd{font-size:1.2rem}section{padding-top:1.4rem}}
@media print{html{background:#fff}body{font-size:10pt}header{padding-top:0}nav{display:none}.scroll{overflow:visible}
table{font-size:8pt}section{padding-top:.8rem}figure,tr,h2{break-inside:avoid}h2,caption{break-after:avoid}
:root{--paper:#fff;--wash:#fff}*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""
PAGE = _COLOURS + _PAGE + PLOT
ALONE = _COLOURS + PLOT
