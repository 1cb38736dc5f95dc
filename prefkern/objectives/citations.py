"""The papers of the objectives, for model cards and for people: `objective.citations()`.

A class names its papers in `papers`; what wraps or mixes objectives adds its own. An adaptive
objective cites AdaDPO first, then the paper of its loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A paper, or a piece of software, that an objective is from.

    Args:
        key: the entry's name in BibTeX.
        title, authors, year: as published; `authors` with " and " between them.
        arxiv: its number on arXiv, where it is there.
        venue: where it was published besides.
        url: where to find it without a number.
    """

    key: str
    title: str
    authors: str
    year: int
    arxiv: str | None = None
    venue: str | None = None
    url: str | None = None

    @property
    def link(self) -> str:
        """The address of its page."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else str(self.url)

    @property
    def bibtex(self) -> str:
        """Its entry, in TRL's layout."""
        rows = {"title": f"{{{self.title}}}", "author": self.authors, "year": str(self.year)}
        kind = "misc"
        if self.venue is not None:
            kind = "inproceedings"
            rows["booktitle"] = self.venue
        if self.arxiv is not None:
            rows |= {"eprint": self.arxiv, "archivePrefix": "arXiv"}
        rows["url"] = self.link
        width = max(map(len, rows))
        lines = [f"    {name:<{width}} = {{{value}}}," for name, value in rows.items()]
        return "\n".join([f"@{kind}{{{self.key},", *lines, "}"])


def without_repeats(papers: Iterable[Paper]) -> tuple[Paper, ...]:
    """Each paper once, in the order given."""
    return tuple(dict.fromkeys(papers))


ADADPO = Paper(
    "chen2026adadpo",
    "AdaDPO: Self-Adaptive Direct Preference Optimization with Balanced Gradient Updates",
    "Shaolong Chen and Madalina Ciobanu and Qingqing Mao and Ritankar Das",
    2026,
    "2605.28440",
)
DPO = Paper(
    "rafailov2023direct",
    "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    "Rafael Rafailov and Archit Sharma and Eric Mitchell and Christopher D. Manning and "
    "Stefano Ermon and Chelsea Finn",
    2023,
    "2305.18290",
    "Advances in Neural Information Processing Systems 36",
)
TULU3 = Paper(
    "lambert2024tulu3",
    "Tulu 3: Pushing Frontiers in Open Language Model Post-Training",
    "Nathan Lambert and others",
    2024,
    "2411.15124",
)
ROBUST_DPO = Paper(
    "chowdhury2024provably",
    "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
    "Sayak Ray Chowdhury and Anush Kini and Nagarajan Natarajan",
    2024,
    "2403.00409",
)
SLIC = Paper(
    "zhao2023slic",
    "SLiC-HF: Sequence Likelihood Calibration with Human Feedback",
    "Yao Zhao and Rishabh Joshi and Tianqi Liu and Misha Khalman and Mohammad Saleh and "
    "Peter J. Liu",
    2023,
    "2305.10425",
)
RSO = Paper(
    "liu2024statistical",
    "Statistical Rejection Sampling Improves Preference Optimization",
    "Tianqi Liu and Yao Zhao and Rishabh Joshi and Misha Khalman and Mohammad Saleh and "
    "Peter J. Liu and Jialu Liu",
    2024,
    "2309.06657",
)
IPO = Paper(
    "azar2024general",
    "A General Theoretical Paradigm to Understand Learning from Human Preferences",
    "Mohammad Gheshlaghi Azar and Mark Rowland and Bilal Piot and Daniel Guo and "
    "Daniele Calandriello and Michal Valko and Rémi Munos",
    2024,
    "2310.12036",
)
RDPO = Paper(
    "park2024disentangling",
    "Disentangling Length from Quality in Direct Preference Optimization",
    "Ryan Park and Rafael Rafailov and Stefano Ermon and Chelsea Finn",
    2024,
    "2403.19159",
)
EXO = Paper(
    "ji2024towards",
    "Towards Efficient Exact Optimization of Language Model Alignment",
    "Haozhe Ji and Cheng Lu and Yilin Niu and Pei Ke and Hongning Wang and Jun Zhu and "
    "Jie Tang and Minlie Huang",
    2024,
    "2402.00856",
)
DISCOPOP = Paper(
    "lu2024discovering",
    "Discovering Preference Optimization Algorithms with and for Large Language Models",
    "Chris Lu and Samuel Holt and Claudio Fanconi and Alex J. Chan and Jakob Foerster and "
    "Mihaela van der Schaar and Robert Tjarko Lange",
    2024,
    "2406.08414",
)
NCA = Paper(
    "chen2024noise",
    "Noise Contrastive Alignment of Language Models with Explicit Rewards",
    "Huayu Chen and Guande He and Lifan Yuan and Ganqu Cui and Hang Su and Jun Zhu",
    2024,
    "2402.05369",
)
SPPO = Paper(
    "wu2024self",
    "Self-Play Preference Optimization for Language Model Alignment",
    "Yue Wu and Zhiqing Sun and Huizhuo Yuan and Kaixuan Ji and Yiming Yang and Quanquan Gu",
    2024,
    "2405.00675",
)
APO = Paper(
    "doosterlinck2024anchored",
    "Anchored Preference Optimization and Contrastive Revisions: "
    "Addressing Underspecification in Alignment",
    "Karel D'Oosterlinck and Winnie Xu and Chris Develder and Thomas Demeester and "
    "Amanpreet Singh and Christopher Potts and Douwe Kiela and Shikib Mehri",
    2024,
    "2408.06266",
)
CPO = Paper(
    "xu2024contrastive",
    "Contrastive Preference Optimization: "
    "Pushing the Boundaries of LLM Performance in Machine Translation",
    "Haoran Xu and Amr Sharaf and Yunmo Chen and Weiting Tan and Lingfeng Shen and "
    "Benjamin Van Durme and Kenton Murray and Young Jin Kim",
    2024,
    "2401.08417",
)
ORPO = Paper(
    "hong2024orpo",
    "ORPO: Monolithic Preference Optimization without Reference Model",
    "Jiwoo Hong and Noah Lee and James Thorne",
    2024,
    "2403.07691",
)
SIMPO = Paper(
    "meng2024simpo",
    "SimPO: Simple Preference Optimization with a Reference-Free Reward",
    "Yu Meng and Mengzhou Xia and Danqi Chen",
    2024,
    "2405.14734",
    "Advances in Neural Information Processing Systems 37",
)
# `sft` is defined as TRL's loss of that name.
TRL = Paper(
    "vonwerra2020trl",
    "TRL: Transformers Reinforcement Learning",
    "von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and "
    "Thrush, Tristan and Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and "
    "Gallouédec, Quentin",
    2020,
    url="https://github.com/huggingface/trl",
)
ALPHA_DPO = Paper(
    "wu2025alphadpo",
    "AlphaDPO: Adaptive Reward Margin for Direct Preference Optimization",
    "Junkang Wu and Xue Wang and Zhengyi Yang and Jiancan Wu and Jinyang Gao and Bolin Ding and "
    "Xiang Wang and Xiangnan He",
    2025,
    "2410.10148",
    "Forty-second International Conference on Machine Learning",
)
MADPO = Paper(
    "rho2025margin",
    "Margin Adaptive DPO: Leveraging Reward Model for Granular Control in Preference Optimization",
    "Hyung Gyu Rho",
    2025,
    "2510.05342",
)
TPO = Paper(
    "saeidi2025tpo",
    "Triple Preference Optimization: Achieving Better Alignment using a Single Step Optimization",
    "Amir Saeidi and Shivanshu Verma and Aswin RRV and Kashif Rasul and Chitta Baral",
    2025,
    "2405.16681",
)
OMNI_DPO = Paper(
    "peng2025omnidpo",
    "Omni-DPO: A Dual-Perspective Paradigm for Dynamic Preference Learning of LLMs",
    "Shangpin Peng and Weinong Wang and Zhuotao Tian and Senqiao Yang and Xing Wu and "
    "Haotian Xu and Chengquan Zhang and Takashi Isobe and Baotian Hu and Min Zhang",
    2025,
    "2506.10054",
)
BETA_DPO = Paper(
    "wu2024beta",
    r"$\beta$-DPO: Direct Preference Optimization with Dynamic $\beta$",
    "Junkang Wu and Yuexiang Xie and Zhengyi Yang and Jiancan Wu and Jinyang Gao and "
    "Bolin Ding and Xiang Wang and Xiangnan He",
    2024,
    "2407.08639",
    "Advances in Neural Information Processing Systems 37",
)
BCO = Paper(
    "jung2024binary",
    "Binary Classifier Optimization for Large Language Model Alignment",
    "Seungjae Jung and Gunsoo Han and Daniel Wontae Nam and Kyoung-Woon On",
    2024,
    "2404.04656",
)
AOT = Paper(
    "melnyk2024distributional",
    "Distributional Preference Alignment of LLMs via Optimal Transport",
    "Igor Melnyk and Youssef Mroueh and Brian Belgodere and Mattia Rigotti and "
    "Apoorva Nitsure and Mikhail Yurochkin and Kristjan Greenewald and Jiri Navratil and "
    "Jerret Ross",
    2024,
    "2406.05882",
)
TDPO = Paper(
    "zeng2024token",
    "Token-level Direct Preference Optimization",
    "Yongcheng Zeng and Guoqing Liu and Weiyu Ma and Ning Yang and Haifeng Zhang and Jun Wang",
    2024,
    "2404.11999",
)
KTO = Paper(
    "ethayarajh2024kto",
    "KTO: Model Alignment as Prospect Theoretic Optimization",
    "Kawin Ethayarajh and Winnie Xu and Niklas Muennighoff and Dan Jurafsky and Douwe Kiela",
    2024,
    "2402.01306",
)
WPO = Paper(
    "zhou2024wpo",
    "WPO: Enhancing RLHF with Weighted Preference Optimization",
    "Wenxuan Zhou and Ravi Agrawal and Shujian Zhang and Sathish Reddy Indurthi and "
    "Sanqiang Zhao and Kaiqiang Song and Silei Xu and Chenguang Zhu",
    2024,
    "2406.11827",
)
RPO = Paper(
    "pang2024iterative",
    "Iterative Reasoning Preference Optimization",
    "Richard Yuanzhe Pang and Weizhe Yuan and Kyunghyun Cho and He He and "
    "Sainbayar Sukhbaatar and Jason Weston",
    2024,
    "2404.19733",
)
MPO = Paper(
    "wang2024enhancing",
    "Enhancing the Reasoning Ability of Multimodal Large Language Models via "
    "Mixed Preference Optimization",
    "Weiyun Wang and Zhe Chen and Wenhai Wang and Yue Cao and Yangzhou Liu and Zhangwei Gao and "
    "Jinguo Zhu and Xizhou Zhu and Lewei Lu and Yu Qiao and Jifeng Dai",
    2024,
    "2411.10442",
)
F_DPO = Paper(
    "wang2024beyond",
    "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence "
    "Constraints",
    "Chaoqi Wang and Yibo Jiang and Chenghao Yang and Han Liu and Yuxin Chen",
    2024,
    "2309.16240",
)
# Of the option `ld_alpha`, which is the loss's and no objective's.
LD_DPO = Paper(
    "liu2024length",
    "Length Desensitization in Direct Preference Optimization",
    "Wei Liu and Yang Bai and Chengcheng Han and Rongxiang Weng and Jun Xu and Xuezhi Cao and "
    "Jingang Wang and Xunliang Cai",
    2024,
    "2409.06411",
)
# Of the option `sync_ref_model`, which is the trainer's.
TR_DPO = Paper(
    "gorbatovski2024learn",
    "Learn Your Reference Model for Real Good Alignment",
    "Alexey Gorbatovski and Boris Shaposhnikov and Alexey Malakhov and Nikita Surnachev and "
    "Yaroslav Aksenov and Ian Maksimov and Nikita Balagansky and Daniil Gavrilov",
    2024,
    "2404.09656",
)
