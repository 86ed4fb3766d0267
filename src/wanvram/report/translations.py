"""Every string of the reports in English and Chinese. `{name}` is filled in; both languages have the same keys."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from wanvram.errors import InputError
from wanvram.foreign_text import shown

__all__ = ["GLOSSARY", "LANGUAGES", "TEXTS", "Texts", "shortened"]

LANGUAGES = ("en", "zh")

# key: (English, Chinese)
_PAIRS: dict[str, tuple[str, str]] = {
    # the answer
    "nothing_recorded": ("Nothing was recorded.", "没有任何记录。"),
    "peak_device_predicted": ("This run will need {bytes} of device memory", "预计该运行需要 {bytes} 显存"),
    "peak_device_measured": ("This run needed {bytes} of device memory", "该运行实测占用 {bytes} 显存"),
    "peak_reserved_predicted": ("This run will need {bytes} of reserved memory", "预计该运行需要 {bytes} 预留内存"),
    "peak_reserved_measured": ("This run needed {bytes} of reserved memory", "该运行实测预留 {bytes} 内存"),
    "peak_allocated_predicted": ("This run will need {bytes} of memory", "预计该运行需要 {bytes} 内存"),
    "peak_allocated_measured": ("This run needed {bytes} of memory", "该运行实测占用 {bytes} 内存"),
    "fits_budget": ("it fits the budget of {budget} with {spare} to spare", "在 {budget} 的预算之内，尚余 {spare}"),
    "exceeds_budget": ("it does not fit the budget of {budget}: {spare} too much", "超出 {budget} 的预算 {spare}"),
    "smallest_card": ("the smallest standard card that holds it has {card} GB", "能容纳它的最小标准显卡为 {card} GB"),
    "no_card": ("no standard card up to {card} GB holds it", "{card} GB 及以下的标准显卡都无法容纳"),
    "failed_oom": ("Out of memory in {stage}: {message}", "在 {stage} 阶段显存不足：{message}"),
    "failed_error": ("The run failed in {stage}: {message}", "运行在 {stage} 阶段失败：{message}"),
    "failed_interrupted": ("The run was interrupted in {stage}: {message}", "运行在 {stage} 阶段被中断：{message}"),
    "until_then_device": ("Its peak until then: {bytes} of device memory.", "在此之前的峰值：{bytes} 显存。"),
    "until_then_reserved": ("Its peak until then: {bytes} of reserved memory.", "在此之前的峰值：预留 {bytes} 内存。"),
    "until_then_allocated": ("Its peak until then: {bytes} of memory.", "在此之前的峰值：{bytes} 内存。"),
    "no_stage": ("no stage", "（无阶段）"),
    "no_component": ("no component", "（无组件）"),
    "unknown": ("unknown", "未知"),
    "owner_activation": (
        "{stage} ({component}) owns the peak: {activation} of activations on top of {there} already there.",
        "峰值出现在 {stage}（{component}）：{activation} 激活，叠加在已有的 {there} 之上。",
    ),
    "owner_weights": (
        "{stage} ({component}) owns the peak: {there} already there, mostly weights, plus {activation} of activations.",
        "峰值出现在 {stage}（{component}）：已有 {there}（主要是权重），再加 {activation} 激活。",
    ),
    "owner_loading": (
        "{stage} ({component}) owns the peak: {activation} of weights loaded by it on top of {there} already there.",
        "峰值出现在 {stage}（{component}）：它加载了 {activation} 权重，叠加在已有的 {there} 之上。",
    ),
    "largest_group": (
        "The largest group alive then: {bytes}, {count} x {what}.",
        "当时最大的一组存活张量：{count} 个 {what}，共 {bytes}。",
    ),
    "group_of": ("{shape} of {module}", "{module} 的 {shape}"),
    "advice": (
        "To lower it: {change} lowers the peak by {saved} ({share}) {cost} (simulated).",
        "降低峰值：{change} 可将峰值降低 {saved}（{share}），{cost}（模拟结果）。",
    ),
    "advice_lossy": (
        "Lossy, the video changes: {change} lowers the peak by {saved} ({share}) {cost} (simulated).",
        "有损，会改变视频：{change} 可将峰值降低 {saved}（{share}），{cost}（模拟结果）。",
    ),
    "advice_unlimited": (
        "On a card without limit this run would need {base}; with {change} {left} ({share} less){fits}, {cost} (simulated).",
        "若显存无上限，该运行需要 {base}；使用 {change} 后为 {left}（减少 {share}）{fits}，{cost}（模拟结果）。",
    ),
    "advice_unlimited_lossy": (
        "Lossy, the video changes: on a card without limit this run would need {base}; with {change} {left} ({share} less)"
        "{fits}, {cost} (simulated).",
        "有损，会改变视频：若显存无上限，该运行需要 {base}；使用 {change} 后为 {left}（减少 {share}）{fits}，{cost}（模拟结果）。",
    ),
    "advice_fits": (", which fits the card", "，可放入该显卡"),
    "advice_exceeds": (", which does not fit the card", "，仍放不进该显卡"),
    "cost_slower": ("for {time} more per run", "每次运行多用 {time}"),
    "cost_faster": ("and takes {time} less per run", "每次运行少用 {time}"),
    "cost_none": ("at no cost in time", "不增加耗时"),
    "cost_unknown": ("at an unknown cost in time", "耗时代价未知"),
    "no_advice": (
        "What lowers it: `wanvram analyze DIR --advice` simulates every change and says what each saves.",
        "怎样降低：`wanvram analyze DIR --advice` 会模拟每一项改动，并给出各自节省多少。",
    ),
    "one_run": ("One run, with a peak of {least}", "一个运行，峰值为 {least}"),
    "best_of": ("Of {count} runs the lowest peak is {least}", "{count} 个运行中最低的峰值为 {least}"),
    "best_shared": (
        "Of {count} runs {shared} share the lowest peak, {least}",
        "{count} 个运行中有 {shared} 个的峰值同为最低：{least}",
    ),
    "worst_shared": ("The highest is {most}, shared by {shared} runs.", "最高为 {most}，共 {shared} 个运行。"),
    "worst_of": ("The highest is {most}.", "最高为 {most}。"),
    "unlike": (
        "{count} runs of {kinds} different tasks, sizes or frame counts: they are ranked only among runs of the same.",
        "{count} 个运行涉及 {kinds} 种不同的任务、尺寸或帧数：仅在相同者之间排名。",
    ),
    "unlike_compared": (
        "Task, size or frames differ: the differences say what was asked for, not which run is better.",
        "任务、尺寸或帧数不同：差值反映的是所请求的内容，而不是哪个运行更好。",
    ),
    "asked": ("{task} {size}, {frames} frames", "{task} {size}，{frames} 帧"),
    "rank": ("rank", "名次"),
    "some_failed": ("Failed runs: {count}.", "失败的运行：{count} 个。"),
    "all_failed": ("None of the {count} runs came to its end.", "{count} 个运行均未完成。"),
    # the terminal
    "asked_run": ("{name}: {task} {size} {frames} frames", "{name}：{task} {size} {frames} 帧"),
    "is_simulated": ("SIMULATED, nothing was run on a GPU ({device})", "模拟运行，未使用 GPU（{device}）"),
    "is_measured": ("MEASURED ({device})", "实测（{device}）"),
    "shared_by": (
        "{gpus} GPUs make it together: {sizes}; the peak is the highest of theirs; they pin {pinned} of host RAM",
        "由 {gpus} 张 GPU 共同生成：{sizes}；峰值取其中最高者；共锁定主机内存 {pinned}",
    ),
    "peak_line": ("Peak: {figures} in {stage}", "峰值：{figures}，位于 {stage}"),
    "peak_elsewhere": ("(in {stage})", "（位于 {stage}）"),
    "why_libraries": (
        "{activation} of libraries' workspaces, before any weights",
        "{activation} 为库的工作区，尚未加载任何权重",
    ),
    "why_load": (
        "{start} there when loading began + {activation} of weights loaded",
        "加载开始时已有 {start} + 加载的权重 {activation}",
    ),
    "why_activation": (
        "{start} there when the stage began + {activation} activation: mostly activations of the stage",
        "阶段开始时已有 {start} + 激活 {activation}：主要是该阶段的激活",
    ),
    "why_weights": (
        "{start} there when the stage began + {activation} activation: mostly weights and tensors already there",
        "阶段开始时已有 {start} + 激活 {activation}：主要是权重和已有的张量",
    ),
    "attention_line": (
        "Attention: {own} among the video's tokens, {cross} to the prompt's ({basis})",
        "注意力：视频词元之间用 {own}，对提示词用 {cross}（{basis}）",
    ),
    "attention_one": ("Attention: {own} ({basis})", "注意力：{own}（{basis}）"),
    "attention_asked": ("asked for, or planned", "按要求指定或由规划决定"),
    "attention_table": ("auto", "自动选择"),
    "attention_check": (
        "auto, by `wanvram check --attention` on this machine",
        "自动选择，依据本机的 `wanvram check --attention`",
    ),
    "in_all": ("Time: {time} in all, from the command to its end", "时间：从命令开始到结束共 {time}"),
    "videos": (
        "{count} videos, {together} together: {each} a video of {time} in all",
        "{count} 个视频，每批 {together} 个：共 {time}，平均每个 {each}",
    ),
    "video_times": ("Videos", "视频"),
    "video": ("video", "视频"),
    "own_time": ("own time", "自身用时"),
    "verdict_failed": ("FAILED ({kind}): {message}", "失败（{kind}）：{message}"),
    "verdict_failed_in": ("FAILED ({kind}) in {stage}: {message}", "在 {stage} 阶段失败（{kind}）：{message}"),
    "verdict_fits": ("Verdict: fits in {budget}", "结论：{budget} 可容纳"),
    "verdict_exceeds": ("Verdict: DOES NOT FIT in {budget}", "结论：{budget} 放不下"),
    "verdict_none": (
        "Verdict: no memory limit was given (--vram 8GiB asks whether it fits)",
        "结论：未给定显存上限（--vram 8GiB 可询问能否容纳）",
    ),
    "largest_moments": ("largest moments:", "最高的时刻："),
    "alive_failed": ("alive when it failed:", "失败时存活："),
    "note": ("note: {note}", "说明：{note}"),
    "make_it_fit": ("what would make it fit:", "怎样才能放下："),
    "advise_dir": (
        "wanvram analyze DIR --advice    (DIR: this run's directory; computes what each change saves)",
        "wanvram analyze DIR --advice    （DIR：该运行的目录；计算每项改动的节省量）",
    ),
    "base_mib": ("base MiB", "基础 MiB"),
    "host_mib": ("host MiB", "主机 MiB"),
    "activation_mib": ("activation MiB", "激活 MiB"),
    "start_mib": ("start MiB", "起始 MiB"),
    "peak_mib": ("peak MiB", "峰值 MiB"),
    "allocated_mib": ("allocated MiB", "已分配 MiB"),
    "reserved_mib": ("reserved MiB", "已预留 MiB"),
    "device_mib": ("device MiB", "设备 MiB"),
    "gpus": ("GPU", "GPU"),
    "every_gpu": ("GPUs", "各 GPU"),
    "talk_mib": ("communication MiB", "通信 MiB"),
    "pinned_mib": ("pinned MiB", "锁页内存 MiB"),
    "sent_mib": ("sent MiB", "发送 MiB"),
    "waited": ("waited for others", "等待其他 GPU"),
    "communication": ("communication", "通信占用"),
    "pinned": ("pinned memory", "锁页内存"),
    "sent": ("sent to others", "发送量"),
    "configured": ("configuration", "配置"),
    "result": ("result", "结果"),
    "peak_in": ("peak in", "峰值所在"),
    "out_of_memory": ("out of memory", "显存不足"),
    "did_fail": ("FAILED", "失败"),
    "and_fits": ("{kind}, fits", "{kind}，可容纳"),
    "and_exceeds": ("{kind}, DOES NOT FIT", "{kind}，放不下"),
    # headings and words
    "title": ("wanvram report", "wanvram 报告"),
    "runs": ("Runs", "运行"),
    "run": ("run", "运行"),
    "task": ("task", "任务"),
    "device": ("device", "设备"),
    "simulated": ("Predicted: simulated, nothing was run on a GPU", "预测：模拟运行，未使用 GPU"),
    "measured_on": ("Measured", "实测"),
    "predicted": ("predicted", "预测"),
    "measured": ("measured", "实测"),
    "prediction_of": ("prediction of {run}", "{run} 的预测"),
    "kind": ("kind", "类型"),
    "peak_device": ("peak device", "设备峰值"),
    "peak_reserved": ("peak reserved", "预留峰值"),
    "peak_allocated": ("peak allocated", "分配峰值"),
    "fragmentation": ("fragmentation", "碎片率"),
    "fluctuation": ("fluctuation", "波动"),
    "time": ("time", "耗时"),
    "time_unloaded": ("time without loading", "耗时（不含加载）"),
    "step": ("step", "每步"),
    "card": ("smallest card", "最小显卡"),
    "budget": ("budget", "预算"),
    "verdict": ("verdict", "结论"),
    "fits": ("fits", "可容纳"),
    "does_not_fit": ("does not fit", "放不下"),
    "failed": ("failed", "失败"),
    "cards": ("Standard cards", "标准显卡"),
    "over_cards": ("over {card} GB", "超过 {card} GB"),
    "timeline": ("Memory over the run", "运行过程中的显存"),
    "axis_events": ("allocator event", "分配器事件"),
    "axis_seconds": ("seconds since the start", "自开始的秒数"),
    "axis_order": ("order of the recorded stages", "记录阶段的顺序"),
    "axis": ("horizontal axis", "横轴"),
    "untimed": ("loading has no known time and takes none here", "加载的耗时未知，在此不占时间"),
    "timeline_help": (
        "Drag across the chart to zoom and to look at the highest moment inside; click to choose the nearest moment; "
        "double-click for the whole run. With the keyboard: arrows choose moments, + and - zoom, 0 shows everything.",
        "在图上拖动可放大并查看其中最高的时刻；单击选择最近的时刻；双击恢复全程。键盘：方向键选择时刻，+ 和 - 缩放，0 显示全程。",
    ),
    "coarse": (
        "This run has no recorded timeline: the curve is drawn from the start, peak and end of each stage and step, "
        "weights are not told apart, and what was alive is unknown.",
        "该运行没有时间线记录：曲线由各阶段和步骤的起点、峰值与终点绘成，未区分权重，也不知道当时存活的张量。",
    ),
    "borrowed": (
        "Curve, weights and what was alive are of this run's prediction; the tables are measured.",
        "曲线、权重与存活张量取自该运行的预测；表格为实测值。",
    ),
    "shortened": (
        "Shortened to keep this file under 2 MB; timeline.json in the run directory has everything.",
        "为使文件小于 2 MB 已作精简；完整数据见运行目录中的 timeline.json。",
    ),
    "whole_run": ("Whole run", "全程"),
    "chart_label": (
        "Memory over the run: peak {peak} allocated in {stage}",
        "运行过程中的显存：分配峰值 {peak}，位于 {stage}",
    ),
    "weights_of": ("weights of {component}", "{component} 的权重"),
    "activations": ("activations and other tensors", "激活与其他张量"),
    "allocated": ("allocated", "已分配"),
    "reserved": ("reserved", "已预留"),
    "stages_ribbon": ("Stages; choose one to see what was alive at its peak", "阶段；选择一个以查看其峰值时的存活张量"),
    "alive": ("What was alive", "当时存活的张量"),
    "moment": ("moment", "时刻"),
    "moment_is": (
        "{label}: {allocated} allocated, {reserved} reserved",
        "{label}：已分配 {allocated}，已预留 {reserved}",
    ),
    "moment_peak": ("peak", "峰值"),
    "moment_of": ("peak of {stage}", "{stage} 的峰值"),
    "group_by": ("group by", "分组"),
    "component": ("component", "组件"),
    "stage": ("stage", "阶段"),
    "module": ("module", "模块"),
    "operation": ("operation", "操作"),
    "shape": ("shape", "形状"),
    "dtype": ("dtype", "数据类型"),
    "count": ("count", "个数"),
    "bytes": ("size", "大小"),
    "share": ("share", "占比"),
    "other": ("other", "其他"),
    "nothing_alive": ("Nothing was alive.", "没有存活的张量。"),
    "treemap_label": (
        "Treemap of what was alive; arrow keys walk through the {count} groups, the table below has the same figures",
        "存活张量的矩形树图；方向键可逐一查看 {count} 组，下方表格内容相同",
    ),
    "pick_tile": (
        "Point at a tile, or walk with the arrow keys, for its details.",
        "指向方块或用方向键移动以查看详情。",
    ),
    "segments": ("The allocator's segments", "分配器的内存段"),
    "segments_text": (
        "{count} segments reserve {reserved}; {free} of it ({share}) holds no tensor, in {holes} holes, "
        "the largest {largest}.",
        "{count} 个段共预留 {reserved}；其中 {free}（{share}）未被使用，分为 {holes} 个空洞，最大的为 {largest}。",
    ),
    "segments_label": (
        "Map of the segments: filled is in use, hatched is a hole",
        "段分布图：实心为使用中，斜纹为空洞",
    ),
    "no_segments": (
        "The map of segments was not recorded or is too large for this file.",
        "没有段分布记录，或其过大而未放入本文件。",
    ),
    "segment": ("segment", "段"),
    "used": ("in use", "使用中"),
    "holes": ("holes", "空洞"),
    "largest_hole": ("largest hole", "最大空洞"),
    "free": ("free", "空闲"),
    "stages": ("Stages", "阶段"),
    "components": ("Components", "组件"),
    "start": ("start", "起始"),
    "activation": ("activation", "激活"),
    "parameters": ("parameters", "参数量"),
    "base": ("base memory", "基础显存"),
    "host": ("host memory", "主机内存"),
    "compare": ("Two runs compared", "两个运行对比"),
    "compare_help": (
        "Pin two runs in the table above; differences are B minus A.",
        "在上表中固定两个运行；差值为 B 减 A。",
    ),
    "pin": ("pin", "固定"),
    "pin_run": ("compare {run}", "对比 {run}"),
    "show": ("show", "查看"),
    "show_run": ("show {run}", "查看 {run}"),
    "figure": ("figure", "指标"),
    "difference": ("difference", "差值"),
    "relative": ("relative", "相对"),
    "whole": ("whole run", "全程"),
    "differing": ("Differences of configuration", "配置差异"),
    "setting": ("setting", "设置项"),
    "value": ("value", "取值"),
    "no_difference": ("The configurations are the same.", "两者配置相同。"),
    "accuracy": ("Predicted against measured", "预测与实测对比"),
    "worst_stage": ("worst stage", "误差最大的阶段"),
    "accuracy_help": (
        "Error is predicted minus measured: + means the prediction was too high.",
        "误差为预测减实测：+ 表示预测偏高。",
    ),
    "error": ("error", "误差"),
    "configuration": ("Configuration", "配置"),
    "environment": ("Environment", "环境"),
    "notes": ("Notes", "说明"),
    "advice_title": ("What changes would save", "各项改动可节省"),
    "advice_change": ("change", "改动"),
    "advice_saved": ("saves", "节省"),
    "advice_left": ("leaves", "剩余"),
    "advice_base": (
        "Each is taken from the {base} that this run would need on a card without limit.",
        "各项均以显存无上限时该运行所需的 {base} 为基准。",
    ),
    "yes": ("yes", "是"),
    "no": ("no", "否"),
    "advice_seconds": ("added time per run", "每次运行增加耗时"),
    "glossary": ("Glossary", "术语"),
    "csv": ("CSV", "CSV"),
    "csv_of": ("download as CSV: {name}", "下载 CSV：{name}"),
    "theme": ("light / dark", "浅色 / 深色"),
    "all_rows": ("all {count} rows", "全部 {count} 行"),
    "search": ("search", "搜索"),
    "search_in": ("search in: {what}", "搜索：{what}"),
    "found": ("{count} of {all}", "{count} / {all}"),
    "found_bytes": ("{count} of {all}: {bytes}", "{count} / {all}：{bytes}"),
    "no_script": (
        "The charts and tables of this report need JavaScript; nothing is loaded from the network.",
        "本报告的图表需要 JavaScript；不会从网络加载任何内容。",
    ),
    "made_by": (
        "Made by wanvram {version} from {count} runs. This file loads nothing from the network.",
        "由 wanvram {version} 根据 {count} 个运行生成。本文件不从网络加载任何内容。",
    ),
}

_TERMS: dict[tuple[str, str], tuple[str, str]] = {
    ("allocated", "已分配"): ("Bytes in the blocks of live tensors.", "存活张量所占内存块的字节数。"),
    ("reserved", "已预留"): (
        "Bytes PyTorch's caching allocator holds: allocated plus what it keeps for later.",
        "PyTorch 缓存分配器持有的字节数：已分配加上留作后用的部分。",
    ),
    ("device", "设备"): (
        "Bytes the driver says the process uses: reserved plus CUDA context and libraries. "
        "This number decides whether a run fits a card.",
        "驱动报告的进程占用：预留加上 CUDA 上下文与库。运行能否放进显卡由它决定。",
    ),
    ("base memory", "基础显存"): ("What a component's weights occupy once loaded.", "组件的权重加载后所占的显存。"),
    ("activation", "激活"): (
        "The peak of a stage minus what was there when it began. Loading has none: what it adds are weights.",
        "阶段峰值减去阶段开始时已有的部分。加载阶段没有激活：新增的是权重。",
    ),
    ("fragmentation", "碎片率"): (
        "(reserved - allocated) / reserved: the share of what is held that no tensor uses.",
        "（预留 - 已分配）/ 预留：持有但未被张量使用的比例。",
    ),
    ("fluctuation", "波动"): ("The spread of allocated memory within a stage.", "阶段内已分配显存的变化幅度。"),
    ("component", "组件"): (
        "A model of the pipeline: text_encoder, image_encoder, dit, vae or prompt_extender.",
        "流水线中的一个模型：text_encoder、image_encoder、dit、vae 或 prompt_extender。",
    ),
    ("stage", "阶段"): (
        "A part of the pipeline: loading, encoding, denoising, decoding.",
        "流水线的一部分：加载、编码、去噪、解码。",
    ),
    ("segment and hole", "段与空洞"): (
        "A segment is one piece of memory got from the driver; a hole is a free block inside it, "
        "usable only by tensors that fit it.",
        "段是向驱动申请的一块显存；空洞是其中的空闲块，只有放得下的张量才能使用。",
    ),
    ("standard card", "标准显卡"): (
        "A card sold as 8 GB has 8 GiB, of which a process can use about 98 %; MiB and GiB are 1024-based.",
        "标称 8 GB 的显卡有 8 GiB，进程约可用其中 98 %；MiB 与 GiB 以 1024 为基。",
    ),
    ("predicted", "预测"): (
        "The same pipeline run on tensors without data through a model of the allocator; no GPU was used.",
        "同一流水线以无数据的张量运行，并经过分配器模型；未使用 GPU。",
    ),
}

TEXTS: dict[str, dict[str, str]] = {
    language: {key: pair[i] for key, pair in _PAIRS.items()} for i, language in enumerate(LANGUAGES)
}
GLOSSARY: dict[str, list[tuple[str, str]]] = {
    language: [(term[i], meaning[i]) for term, meaning in _TERMS.items()] for i, language in enumerate(LANGUAGES)
}


@dataclass(frozen=True)
class Texts:
    """The strings of one language: `texts("budget")`. Raises InputError for an unknown language."""

    language: str = "en"

    def __post_init__(self) -> None:
        if self.language not in LANGUAGES:
            raise InputError(f"--lang: '{self.language}' is unknown; choose one of {', '.join(LANGUAGES)}")

    def __call__(self, key: str, **values: object) -> str:
        """The sentence with its values; names and messages among them come from outside and stay within it."""
        safe = {name: shown(value) if isinstance(value, str) else value for name, value in values.items()}
        return TEXTS[self.language][key].format(**safe)

    def sentence(self, parts: Sequence[str]) -> str:
        """Clauses joined to one sentence."""
        if self.language == "zh":
            return "；".join(parts) + "。"
        return "; ".join(parts) + "."

    def listed(self, parts: Sequence[str]) -> str:
        """Parts of one clause."""
        return ("，" if self.language == "zh" else ", ").join(parts)

    def join(self, *sentences: str) -> str:
        """Sentences after one another."""
        return ("" if self.language == "zh" else " ").join(sentence for sentence in sentences if sentence)


def shortened(value: object, limit: int) -> str:
    """A setting or a sentence of a record, at most `limit` characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"
