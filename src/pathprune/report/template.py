"""The report's page, as a Jinja2 template: its own styles, no scripts, nothing fetched."""

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}: a family of models</title>
<style>
:root { --page: #f6f7f9; --card: #ffffff; --ink: #22272e; --soft: #5c6570; --line: #dfe3e8; --accent: #0072b2;
  --track: #e9edf1; --shade: #0003; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171b; --card: #1d2126; --ink: #e6e9ed; --soft: #a3acb7; --line: #343a42; --accent: #6cb8ea;
    --track: #2d333b; --shade: #000b; }
  .drawing svg { filter: invert(.92) hue-rotate(180deg) brightness(1.15); } /* light for dark, hues as they were */
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere; }
h1 { font-size: 2rem; margin: 0 0 .25rem; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .75rem; }
h3 { font-size: .95rem; margin: 0 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0; }
.soft, figcaption, dt { color: var(--soft); }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: .75rem; }
.tiles { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); margin-top: 1.5rem; }
.facts { columns: 20rem; column-gap: 1rem; }
.facts .card { break-inside: avoid; margin-bottom: 1rem; }
.tiles .card, .facts .card { padding: 1rem 1.25rem; min-width: 0; overflow-wrap: anywhere; }
.tiles strong { display: block; font-size: 1.9rem; line-height: 1.2; color: var(--accent); }
.wide, .drawing { overflow-x: auto; /* the shade at an edge is there while something lies beyond it */
  background: linear-gradient(to right, var(--card) 40%, transparent) 0 0 / 4rem 100% local,
    linear-gradient(to left, var(--card) 40%, transparent) 100% 0 / 4rem 100% local,
    linear-gradient(to right, var(--shade), transparent) 0 0 / 1.25rem 100% scroll,
    linear-gradient(to left, var(--shade), transparent) 100% 0 / 1.25rem 100% scroll;
  background-repeat: no-repeat; background-color: var(--card); }
.hint { display: none; color: var(--soft); font-size: .85rem; }
@media (max-width: 62rem) { .hint { display: block; } }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .55rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
td:last-child, thead tr:last-child th:last-child { padding-right: 1.1rem; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { font-weight: 600; vertical-align: bottom; color: var(--soft); }
th[scope=colgroup] { border-bottom: 0; padding-bottom: 0; text-align: center; }
tbody th, thead th:first-child { text-align: left; padding-left: 1.1rem;
  position: sticky; left: 0; background: var(--card); }
small { display: block; color: var(--soft); font-size: .8rem; }
.notes { color: var(--soft); font-size: .85rem; max-width: none; margin-top: .75rem; }
.bar { display: block; height: .3rem; margin-top: .3rem; border-radius: .15rem; background: var(--track); }
.bar i { display: block; height: 100%; border-radius: inherit; background: var(--accent); }
figure { margin: 0; padding: 1rem 1.25rem; }
.drawing { padding: .5rem; }
.drawing svg { display: block; margin: 0 auto; height: auto; max-width: 100%; }
figcaption { margin-top: .75rem; max-width: 52rem; font-size: .925rem; }
pre { padding: 1rem 1.25rem; overflow-x: auto; margin: .75rem 0; }
code { font: .875rem/1.6 ui-monospace, "Cascadia Code", Menlo, Consolas, monospace; }
p code { white-space: nowrap; }
dl { margin: 0; display: grid; grid-template-columns: auto 1fr; gap: .15rem .9rem; font-size: .875rem; }
dd { margin: 0; }
@media (max-width: 40rem) { main { padding: 1.5rem .75rem 3rem; } h1 { font-size: 1.6rem; } figure { padding: .6rem; } }
</style>
</head>
<body>
<main>
<header>
<h1>{{ title }}: one search, {{ smaller|length }} smaller model{{ "" if smaller|length == 1 else "s" }}</h1>
<p class="soft">{{ family.model.architecture }} · {{ family.date }}</p>
<p>{{ summary }}</p>
</header>

<div class="tiles">
{% for member in smaller %}
<div class="card">
<h3>{{ member.name }}</h3>
<strong>{{ "%.3f"|format(reached(member)[headline]) }}</strong>
{{ family.metrics[headline].label }}{{ " after recovery" if recovered(member) }}
<div class="soft">{{ member.params_fraction_of_whole_model|percent }} of all parameters,
{{ member.bytes_on_disk|megabytes }}{% if batches %},
{{ "%.2f"|format(speed_up(member, batches[-1])) }}× the speed at batch {{ batches[-1] }}{% endif %}</div>
</div>
{% endfor %}
</div>

<h2>The numbers</h2>
<p class="hint">The table is wider than a small screen: scroll it sideways for all columns. →</p>
<div class="card wide">
<table>
<thead>
<tr>
<th rowspan="2" scope="col">model</th>
<th rowspan="2" scope="col">size<br>on disk</th>
<th rowspan="2" scope="col">parameters</th>
<th rowspan="2" scope="col">prunable<br>params kept</th>
<th rowspan="2" scope="col">MACs<br>per token</th>
{% for batch in batches %}
<th rowspan="2" scope="col">latency<br>batch {{ batch }}</th>
{% endfor %}
{% for metric in family.metrics.values() %}
<th {{ 'colspan="2" scope="colgroup"'|safe if recovery else 'rowspan="2" scope="col"'|safe }}>{{ metric.label }}</th>
{% endfor %}
</tr>
<tr>
{% for metric in family.metrics if recovery %}
<th scope="col">before</th><th scope="col">after</th>
{% endfor %}
</tr>
</thead>
<tbody>
{% for member in family.members %}
<tr>
<th scope="row">{{ member.name }}</th>
<td>{{ member.bytes_on_disk|megabytes }}</td>
<td>{{ member.params|count }} <small>{{ member.params_fraction_of_whole_model|percent }}</small></td>
<td>{{ member.prunable_params_kept_fraction|percent }}
<span class="bar"><i style="width:{{ member.prunable_params_kept_fraction|percent }}"></i></span></td>
<td>{{ member.macs_per_token|count }} <small>{{ member.macs_fraction_of_whole_model|percent }}</small></td>
{% for batch in batches %}
<td>{{ member.latency_ms[batch]|milliseconds }} <small>{{ "%.2f"|format(speed_up(member, batch)) }}×</small></td>
{% endfor %}
{% for metric in family.metrics %}
{% for part in ["before", "after"][:2 if recovery else 1] %}
<td>{{ "%.3f"|format(member.quality[part][metric]) if part in member.quality else "–" }}</td>
{% endfor %}
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
<p class="notes">
1 MB is a million bytes. MACs are multiply-accumulates of the whole model per token, at {{ dense.seq_len }} tokens;
{% if batches %}
× is the dense model's latency over this one's, measured at {{ family.latency_tokens }} tokens;
{% endif %}
{{ "before and after refer to the recovery." if recovery else "no recovery was run." }}
{% for metric in family.metrics.values() %}
{{ metric.label }}: {{ metric.text }}.
{% endfor %}
</p>

{% for heading, svg, caption in pictures %}
<h2>{{ heading }}</h2>
<figure>
<div class="drawing">{{ svg }}</div>
<figcaption>{{ caption }}</figcaption>
</figure>
{% endfor %}

<h2>Load a model</h2>
<pre class="card"><code>import pathprune  # teaches transformers to load pruned shapes
from transformers import {{ loader }}

model = {{ loader }}.from_pretrained({{ smaller[0].folder|tojson }})  # relative to this report's folder
</code></pre>
{% if smaller|length > 1 %}
<p>The other members load alike:
{% for member in smaller[1:] %}<code>{{ member.folder }}</code>{{ "." if loop.last else ", " }}{% endfor %}</p>
{% endif %}

<h2>How it was made</h2>
<div class="facts">
{% for heading, facts in made %}
<div class="card">
<h3>{{ heading }}</h3>
<dl>
{% for name, value in facts %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>
</div>
{% endfor %}
</div>
</main>
</body>
</html>
"""
