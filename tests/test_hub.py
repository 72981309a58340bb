"""The card that a trained model gets."""

from huggingface_hub import ModelCard

from ddpm_hf.config import TrainingConfig
from ddpm_hf.hub import TAGS, write_card


def card(tmp_path, **settings):
    config = TrainingConfig(output_dir=str(tmp_path), **settings)
    facts = dict(step=1000, loss=0.12345, parameters=1_234_567, channels=1, num_images=6000)
    return ModelCard.load(write_card(config, global_batch_size=16, **facts))


def test_the_card_of_the_embedded_images(tmp_path):
    made = card(tmp_path, dataset_name="embedded", resolution="28x32")
    assert made.data.to_dict() == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "license": "mit",
        "tags": TAGS,
    }
    text = made.text
    for part in (
        "28x32\ngrey images, 1,234,567 parameters",
        f'pipe = DDPMPipeline.from_pretrained("{tmp_path.name}")',
        "6,000 of Fashion-MNIST (MIT licence, Zalando SE)",
        "1,000, 16,000 images seen",
        "| final training loss | 0.1235 |",
        "`v_prediction`",
        "their moving average",
    ):
        assert part in text, part
    assert "{{" not in text
    assert "{%" not in text
    assert "That variance is for" not in text


def test_the_card_of_a_hub_set_names_it(tmp_path):
    made = card(tmp_path, dataset_name="org/photos", variance_type="fixed_large")
    assert made.data.datasets == ["org/photos"]
    assert made.data.license is None
    assert "[org/photos](https://huggingface.co/datasets/org/photos)" in made.text
    assert "That variance is for 1000 steps" in made.text


def test_the_card_of_a_local_set_does_not_name_its_path(tmp_path):
    made = card(tmp_path, train_data_dir="secret/place", use_ema=False)
    assert made.data.datasets is None
    assert "a local image set" in made.text
    assert "secret" not in made.text
    assert "the last ones" in made.text


def test_the_card_of_a_class_conditional_network_does_not_promise_what_stock_cannot(tmp_path):
    text = card(tmp_path, dataset_name="embedded", class_conditional=True).text
    assert "diffusers' own `DDPMPipeline` cannot sample" in text
    assert "from diffusers import DDPMPipeline" not in text
    assert text.count("class_labels=0") == 2
    assert "{%" not in text
