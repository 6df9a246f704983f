"""Fine-tuning: pre-trained models on labelled or plain text, each optimizer at settings swept alike."""
