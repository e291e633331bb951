// What the numbers about an answer mean, in words. Pure functions: nothing here touches the page.

const NOT_NOISE = 1e-6; // the bound of `tsqp audit`: below it the bytes are not noise
const count = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** A whole number with its thousands apart. */
export function whole(number) {
  return count.format(number);
}

/** Bytes in the unit in which they are short. */
export function bytes(number) {
  if (number < 1024) return `${number} bytes`;
  const units = ["KiB", "MiB", "GiB", "TiB"];
  let size = number / 1024;
  while (size >= 1024 && units.length > 1) {
    size /= 1024;
    units.shift();
  }
  return `${size.toFixed(size < 10 ? 2 : size < 100 ? 1 : 0)} ${units[0]}`;
}

/** A share in percent; the sign stays on the line of its number. */
export function percent(share) {
  return `${Number((100 * share).toFixed(1))}\u00a0%`;
}

/** A probability with three digits. */
export function probability(p) {
  if (p === 0) return "0";
  if (p >= 0.001) return String(Number(p.toPrecision(3)));
  const [digits, power] = p.toExponential(2).split("e");
  const raised = [...power].map((one) => (one === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[one])).join("");
  return `${digits} × 10${raised}`;
}

/**
 * What to think of it all: `kind` is "words", "noise", "unclear" or "nothing". From the measurements and not from the
 * name of the mode: a mode that did not keep its promise would be seen here.
 */
export function verdict(seen) {
  if (seen.calls === 0) {
    return { kind: "nothing", title: "Nothing.", text: "No worker had a part in this answer." };
  }
  const [recovered, ofNoise] = [seen.recovered_fraction, seen.noise_fraction];
  const notNoise = seen.uniformity_p !== null && seen.uniformity_p < NOT_NOISE;
  // Of what looks like noise a token or two may be right by luck.
  const luck = notNoise ? 0.1 : Math.max(0.1, 2 / Math.max(1, seen.user_tokens));
  if (recovered > ofNoise + luck) {
    const text =
      recovered === 1
        ? "Whoever has the public model turns the numbers that were sent back into your whole message."
        : `Whoever has the public model turns the numbers that were sent back into ${percent(recovered)} of your message.`;
    return { kind: "words", title: "Your words.", text };
  }
  const found = recovered === 0 ? "none of your words" : "no more of your words than luck may give";
  if (seen.uniformity_p === null) {
    const text = `An attack finds ${found}. Too few numbers were sent to test whether they are noise.`;
    return { kind: "unclear", title: "Too little to tell.", text };
  }
  if (notNoise) {
    const text = "The numbers that were sent are not noise. This attack reads little in them; a better one may read more.";
    return { kind: "unclear", title: "Not noise.", text };
  }
  const text = `A test cannot tell the numbers that were sent from uniform noise, and an attack on them finds ${found}.`;
  return { kind: "noise", title: "Noise.", text };
}

/** What the p-value means. It is that of several tests together, so a bound: the chance is at most that. */
export function uniformity(p) {
  if (p === null) return "There are too few numbers for the test.";
  if (p < NOT_NOISE) return "Uniform noise is never this uneven. Below 10⁻⁶ these bytes are not noise.";
  const bound = "Only below 10⁻⁶ would these bytes not be noise.";
  if (p > 0.99) return `No test finds these bytes more uneven than uniform noise often is. ${bound}`;
  const often = p >= 0.01 ? `${Math.round(100 * p)} of 100` : `1 of ${whole(1 / p)}`;
  return `Uniform noise is at least this uneven in up to ${often} cases. ${bound}`;
}

/** How much of the message an attack put in its places, and of noise. */
export function shares(seen) {
  const right = whole(Math.round(seen.recovered_fraction * seen.user_tokens));
  const tokens = `${right} of ${whole(seen.user_tokens)} tokens of your message are right (${percent(seen.recovered_fraction)}).`;
  return `${tokens} From fresh noise the same attack gets ${percent(seen.noise_fraction)}.`;
}

/** The numbers of a run: `[term, value, what it means]` of each. */
export function numbers(seen) {
  const speed = seen.seconds > 0 ? (seen.tokens / seen.seconds).toFixed(1) : "–";
  const rows = [
    ["Sent to the worker", bytes(seen.bytes_seen), `in ${whole(seen.calls)} calls`],
    ["Speed", `${speed} tokens/s`, `${whole(seen.tokens)} tokens in ${seen.seconds.toFixed(1)} s`],
    seen.checks
      ? ["Products checked", whole(seen.checks), "each before it was used"]
      : ["Products checked", "none", `at ${seen.protection} the worker is believed`],
  ];
  rows.push(
    seen.pads_left === null
      ? ["Pads left", "none", `${seen.protection} uses no pads`]
      : ["Pads left", whole(seen.pads_left), "enough for so many tokens"],
  );
  return rows;
}

/** Why an answer ended, where it is worth a word. */
export function ending(reason) {
  return { length: "Ended at the limit of tokens." }[reason] ?? "";
}
